import pytest
import torch

from carafe_d2 import CarafeCheckpointer, CARAFEPack
from carafe_d2.errors import UserError


def test_saves_and_loads(tmp_path):
    saved, loaded = CARAFEPack(4, 2), CARAFEPack(4, 2)
    CarafeCheckpointer(saved, str(tmp_path)).save("model", iteration=7)
    rest = CarafeCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    assert rest["iteration"] == 7
    assert torch.equal(saved.content_encoder.weight, loaded.content_encoder.weight)


def test_empty_path_leaves_the_model_alone():
    pack = CARAFEPack(4, 2)
    before = pack.content_encoder.weight.clone()
    CarafeCheckpointer(pack).load("")
    assert torch.equal(pack.content_encoder.weight, before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "model.pth do not exist; set MODEL.WEIGHTS"),
        (lambda file: file.write_bytes(b""), "model.pth is not a readable checkpoint"),
        (lambda file: file.write_bytes(b"no checkpoint"), "model.pth is not a readable checkpoint"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:1000]),
            "model.pth is not a readable checkpoint",
        ),
    ],
    ids=["missing", "empty", "foreign", "truncated"],
)
def test_unusable_files_are_named(tmp_path, spoil, message):
    checkpointer = CarafeCheckpointer(CARAFEPack(4, 2), str(tmp_path))
    checkpointer.save("model")
    spoil(tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        checkpointer.load(str(tmp_path / "model.pth"))


def test_unreachable_address_is_named():
    with pytest.raises(UserError, match="cannot fetch the weights http://localhost:1/model"):
        CarafeCheckpointer(CARAFEPack(4, 2)).load("http://localhost:1/model.pth")
