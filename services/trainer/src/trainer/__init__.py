"""The trainer: takes training requests and runs each in a sandbox of its own, once at a time, until it ends well or for good."""
