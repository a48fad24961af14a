"""A model server that follows the registry and collects feedback.

server.py settings.py  from settings to a listening process; connections.py limits slow and malformed clients
app.py routes.py       the HTTP routes; state.py holds the parts that they share; auth.py and limits.py check requests
requests.py rows.py    the body of a request as rows
description.py         what /model, /docs and /v2 tell about the model
model.py batching.py   one loaded version, and concurrent requests to it; fastpath/ answers the same as MLflow, faster
follower.py            which version serves: the alias in the registry, cache.py, webhooks.py
prediction_log.py      stores predictions in the store of alacarte/feedback
tracing.py             a span of OpenTelemetry for each request
"""
