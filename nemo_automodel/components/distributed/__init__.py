"""How a run is spread over processes: the environment, the mesh, sharding, and gradients over it."""
