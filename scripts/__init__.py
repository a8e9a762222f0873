"""What `make` runs: set up this machine, make the images, show the demo."""
