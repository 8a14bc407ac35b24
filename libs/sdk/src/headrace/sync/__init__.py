"""MLflow's stores, brought into Headrace and written from it: readers, the importer, the exporter."""
