"""train: learn from the train part of the data, log the model and print the run id.

    mlflow run . -e train --env-manager local -P model=torch_mlp -P seed=7
    python -m steps.train data=table data.path=houses.csv data.target=price

Result: a run with the logged model `model`, train_ and val_ metrics, learning curves, the dataset with its digest, and the
configuration.
"""

import mlflow
from omegaconf import DictConfig

from alacarte import launch, tracking
from alacarte.data.columns import names_of
from alacarte.data.dataset import as_mlflow, columns_like_ids, load_data
from alacarte.data.tables import absolute
from alacarte.errors import as_argument
from alacarte.evaluation.metrics import load_metrics, score_parts
from alacarte.features import make_features
from alacarte.formats.check import make_folder


@launch.step("train")
def main(cfg: DictConfig) -> None:
    folder = make_folder("save_to", cfg.save_to) if cfg.save_to else None  # before hours of training
    own_metrics = load_metrics(launch.plain(cfg.metrics))
    data = launch.plain(cfg.data)
    dataset = load_data(**data)
    X, y = dataset.part("train")
    X_val, y_val = dataset.part("val")
    print(f"train: {dataset.name}, {len(X)} rows of {X.shape[1]} columns, {dataset.task} of {dataset.target}")
    for column in columns_like_ids(X):
        drop = as_argument("data.drop", [column])
        print(f"train: {column} has another text in each row: if it is an id, leave it out with {drop}")
    mlflow.log_input(as_mlflow(dataset, "train"), context="train")

    made = launch.instantiate(cfg.features, _convert_="all")
    features = make_features(cfg.features._target_, made, names_of(data.get("text")))
    learner = launch.instantiate(cfg.model)
    learner.fit(
        X, y, X_val, y_val, task=dataset.task, seed=cfg.seed, features=features, weight=dataset.weight("train"),
        val_weight=dataset.weight("val"), on_epoch=lambda epoch, metrics: mlflow.log_metrics(metrics, step=epoch),
    )  # fmt: skip

    # The model says what it learned from, so that evaluate needs nothing but the model.
    if "path" in data:
        data["path"] = absolute(str(data["path"]))  # for whoever evaluates from another folder
    metadata = {"data": data, **dataset.metadata, "run_id": tracking.active_run().info.run_id}
    info = learner.log("model", example=X.head(5), metadata=metadata)
    if folder:
        learner.save(folder, example=X.head(5), metadata=metadata)

    parts = {"train": (X, y, dataset.weight("train")), "val": (X_val, y_val, dataset.weight("val"))}
    metrics = score_parts(learner, parts, own_metrics)
    mlflow.log_metrics(metrics, model_id=info.model_id)
    mlflow.set_tag("dataset_digest", dataset.digest)
    run_argument = f"run_id={metadata['run_id']}"
    summary = {
        "model": info.model_uri,
        "metrics": f"val {tracking.describe_metrics(metrics, 'val_')}",
        "next": tracking.step_command("evaluate", run_argument),
    }
    tracking.print_summary("train", summary)
    print(run_argument)  # the last line is an argument of the next step: evaluate $(python -m steps.train | tail -1)


if __name__ == "__main__":
    main()
