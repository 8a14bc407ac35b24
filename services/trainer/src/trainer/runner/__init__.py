"""`python -m trainer.runner FOLDER`: runs one attempt of a training, from fetching its source to ending its run."""
