"""The evaluator: judges the model of a finished run, as it would be served, on the frozen holdout beside the champion."""
