"""A model server that follows the registry and collects feedback.

server.py          from settings to a listening process
app.py routes.py   the HTTP routes; state.py holds what they share, connections.py limits slow clients
requests.py        the bytes of a request as rows; reference.py and matrix.py belong to it
model.py           one loaded version; fastpath/ answers the same as MLflow, faster
follower.py        which version serves: the registry's alias, cache.py, webhooks.py
prediction_log.py  predictions on their way to the store of alacarte/feedback
"""
