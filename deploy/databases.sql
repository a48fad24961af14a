CREATE DATABASE auth; -- accounts of the MLflow server
CREATE DATABASE feedback; -- predictions and labels
