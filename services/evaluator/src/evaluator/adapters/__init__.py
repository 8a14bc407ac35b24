"""The evaluator's ways to its database, the tracker, the sandboxed process and the pages of its reports."""
