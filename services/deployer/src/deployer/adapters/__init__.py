"""The deployer's ways to its database and to the runtimes."""
