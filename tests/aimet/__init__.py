"""aimet-torch as the oracle of the grid, in an environment of its own: `make test-aimet`."""
