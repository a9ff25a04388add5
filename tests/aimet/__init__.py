"""aimet-torch as the oracle of grids and simulations: `make test-aimet`."""
