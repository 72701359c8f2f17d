//! From images to running tasks: the engine that `laz` (and later `lazd`) runs.
