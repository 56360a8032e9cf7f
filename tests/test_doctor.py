import json

import torch

from qformer_fast import doctor, ops


def test_report_names_versions_devices_and_every_op():
    found = json.loads(json.dumps(doctor.report()))
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["devices"][0]["name"].startswith("cpu")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert set(found["ops"]) == set(ops.__all__)
    assert found["one_launch"] or torch.cuda.is_available()
    for op in found["ops"].values():
        assert op["uses"] not in op["unavailable"]
        assert "reference" not in op["unavailable"]
    assert found["ops"]["bias_gelu"]["unavailable"]["cuda"] == "has no bias_gelu"


def test_text_says_why_a_backend_can_not_run():
    found = doctor.report()
    text = doctor.as_text(found)
    for reason in found["backends"].values():
        assert reason is None or reason in text
    assert all(name in text for name in ops.__all__)
