"""Further options of the config groups, a file each; the core imports none of them."""
