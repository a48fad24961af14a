"""A model server that follows the registry and collects feedback.

server.py, workers.py   from settings to listening processes
http/                   requests and answers of one process, and the page for people
reading/                the bytes of a request as rows
model/                  a model folder that answers, and the faster paths to the same answers
follow/                 which version serves: the registry's alias, the cache, webhooks
recorder.py             predictions on their way to the store of mlops/feedback
"""
