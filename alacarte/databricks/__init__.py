"""Run the project as Databricks jobs, and follow the champion with a serving endpoint."""
