"""Loading checkpoints, with errors that name the file and what is wrong with it."""

import os
import pickle

from detectron2.checkpoint import DetectionCheckpointer

from .errors import UserError


class CarafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for CARAFE models."""

    def load(self, path: str, *args, **kwargs) -> dict:
        """Loads weights, and with ``checkpointables`` also training state.

        Args:
            path: a file, or an address that Detectron2's path manager knows (https, detectron2);
                empty leaves the model as it was initialised.
            *args, **kwargs: see :class:`fvcore.common.checkpoint.Checkpointer`.

        Returns:
            What the file holds beyond the weights and the state that was loaded.

        Raises:
            UserError: the file is missing, cannot be fetched or is no checkpoint.
        """
        if path:
            try:
                local_path = self.path_manager.get_local_path(path)
            except Exception as error:  # the path handlers raise whatever their protocol raises
                raise UserError(f"cannot fetch the weights {path}: {error}") from error
            if not os.path.isfile(local_path):
                raise UserError(
                    f"weights {path} do not exist; set MODEL.WEIGHTS to a checkpoint, or to '' to "
                    "start from random weights"
                )
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else "the file ends too early"
            raise UserError(f"{filename} is not a readable checkpoint: {reason}") from error
