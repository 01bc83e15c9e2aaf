"""What MLflow runs when it serves a registered segmenter. MLflow copies this file into the artefact and executes it.

    model = mlflow.pyfunc.load_model("models:/thermofuse-msrs-1shot@champion")
    answer = model.predict({"query": query, "support": support, "support_mask": support_mask}, params={"fold": 0})

One query a call. H x W pixels (any size), K supports of the query's size:

    query         uint8 [H, W]      infrared, 0..255
    support       uint8 [K, H, W]   infrared, 0..255
    support_mask  uint8 [K, H, W]   1 where the class is, else 0
    fold          whose learners answer; -1 lets the model choose
    -> mask       uint8 [H, W]      1 where the class is in the query, else 0
       probability  float32 [H, W]  of the class, 0..1

Nothing of `tasks` or `flows` is imported: beside the weights the artefact holds the `models` package alone.
"""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import mlflow
import numpy as np


class Segmenter(mlflow.pyfunc.PythonModel):
    """A predictor behind MLflow's interface; `model_config["predictor"]` names its class."""

    def load_context(self, context: Any) -> None:
        predictor = resolve_name(context.model_config["predictor"])
        self.predictor = predictor.load(Path(context.artifacts["model"]))

    # `model_input` is a dict of arrays; MLflow knows no hint for that and warns of every other, so np.ndarray it is.
    def predict(self, context: Any, model_input: np.ndarray, params: dict | None = None) -> dict[str, np.ndarray]:
        fold = int((params or {}).get("fold", -1))
        mask, probability = self.predictor.predict(
            np.asarray(model_input["query"]),
            list(np.asarray(model_input["support"])),
            list(np.asarray(model_input["support_mask"])),
            fold=None if fold < 0 else fold,
        )
        return {"mask": np.asarray(mask, np.uint8), "probability": np.asarray(probability, np.float32)}


mlflow.models.set_model(Segmenter())
