# docker build --target serve -t alacarte-serve .
# Two stages: packages are installed in the first one, so that the images that run contain no compiler and no pip cache.
FROM python:3.11-slim AS build
RUN python -m venv /venv
COPY requirements.txt /build/requirements.txt
COPY deploy/requirements.txt /build/deploy.txt
# The CPU build of torch is small; delete the extra index for a GPU.
RUN /venv/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -r /build/requirements.txt -r /build/deploy.txt

FROM python:3.11-slim AS base
RUN useradd --create-home --uid 10001 app && mkdir -p /app/.serving && chown -R app /app
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
COPY --chown=app . .
USER app

FROM base AS mlflow
EXPOSE 5000
HEALTHCHECK --interval=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:5000/health', timeout=3)"]

FROM base AS serve
EXPOSE 8080
HEALTHCHECK --interval=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/livez', timeout=3)"]
CMD ["python", "-m", "steps.serve", "serve.host=0.0.0.0"]
