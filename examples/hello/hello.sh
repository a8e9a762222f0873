#!/bin/sh
# Prints the greeting that the build baked in.
cat /greeting.txt
