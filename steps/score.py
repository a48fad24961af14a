"""score: answer a table of rows with one version of a model, and write the table with the answers.

    mlflow run . -e score --env-manager local -P input=houses.csv -P output=prices.parquet
    python -m steps.score model_uri=models:/alacarte/3 input=rows.parquet output=answers.csv

Result: the file, with the version and the run in each row, and a run that names the model, the input and the output with their
digests. Prints the run id.
"""

import mlflow
from omegaconf import DictConfig

from alacarte import launch, learners, registry, scoring, tracking
from alacarte.data import tables
from alacarte.data.dataset import table_as_mlflow


@launch.step("score")
def main(cfg: DictConfig) -> None:
    registry.check_name(cfg.registered_model_name)
    scoring.check_output(cfg.input, cfg.output, cfg.spreadsheet_safe)  # before hours of answering
    uri, number = registry.pin(cfg.model_uri, cfg.registered_model_name)
    model = registry.locate(uri)
    learner = learners.load(model.path)

    table, rows, digest = scoring.open_input(cfg.input, cfg.separator)
    inputs = scoring.read_inputs(table, model.metadata)
    run_id = tracking.active_run().info.run_id
    answers = scoring.answer(learner, inputs, cfg.input, cfg.probabilities).assign(model_version=number, run_id=run_id)
    scoring.write_output(scoring.beside(rows, answers), cfg.output, spreadsheet_safe=cfg.spreadsheet_safe)

    mlflow.log_input(table_as_mlflow(inputs, cfg.input, digest), context="score")
    tracking.log_model_input(model.model_id)
    mlflow.log_metric("rows", len(rows))
    mlflow.set_tags(
        {
            "source_run_id": model.run_id or "none", "model_uri": uri, "model_version": number,
            "input_digest": digest, "output": tables.absolute(str(cfg.output)),
            "output_digest": tables.path_digest(str(cfg.output)),
        }
    )  # fmt: skip
    tracking.print_summary("score", {"model": uri, "rows": f"{len(rows):,}", "output": cfg.output})
    print(f"run_id={run_id}")


if __name__ == "__main__":
    main()
