"""The bytes of a request as rows, by the forms that MLflow takes."""
