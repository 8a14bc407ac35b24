"""The tracker: experiments, runs, their metrics, artifacts and models, and data sets. It says when a run has ended."""
