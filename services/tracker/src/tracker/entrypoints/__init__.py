"""How calls reach the tracker."""
