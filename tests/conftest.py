"""What all tests share."""

from hypothesis import settings

# A shared machine may stall for longer than hypothesis' 200 ms; pytest-timeout catches what hangs.
settings.register_profile("podbuild", deadline=None)
settings.load_profile("podbuild")

pytest_plugins = ["tests.engine", "tests.cluster_fixtures"]
