"""serve: answer requests with the champion of the registry, follow it without a restart, store predictions and feedback.

    mlflow run . -e serve --env-manager local -P registered_model_name=alacarte
    python -m steps.serve serve.port=9000 feedback.url=postgresql+psycopg://user@host/feedback

Result: an HTTP server, and predictions and labels in the feedback store. It opens no run. It can start before a model exists.
"""

from omegaconf import DictConfig

from alacarte import launch
from alacarte.errors import UserError
from alacarte.serving import server
from alacarte.serving.settings import Settings


@launch.step("serve", run=False, offline=True)
def main(cfg: DictConfig) -> None:
    if not cfg.registered_model_name:
        raise UserError("registered_model_name=null: serve needs the name of a registered model")
    settings = Settings.make(
        registered_model_name=cfg.registered_model_name, feedback=launch.plain(cfg.feedback), **launch.plain(cfg.serve)
    )
    server.run(settings)


if __name__ == "__main__":
    main()
