"""serve: answer requests with the champion of the registry, follow it without a restart, keep predictions and feedback.

    mlflow run . -e serve --env-manager local -P registered_model_name=alacarte
    python -m steps.serve serve.port=9000 feedback.url=postgresql+psycopg://user@host/feedback

Leaves behind predictions and labels in the feedback store; hands on HTTP. It needs no run of its own, and starts before
there is any model.
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
