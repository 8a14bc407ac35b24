"""The deployer: endpoints, arms and rollouts, judged by sequential statistics."""
