"""Fair comparison of runs: which choice helps, by how much, and how sure one can be."""
