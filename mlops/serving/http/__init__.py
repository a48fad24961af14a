"""Requests and answers: one worker process as an ASGI application, and the page for people."""
