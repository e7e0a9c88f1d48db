import eight_devices
import pytest


def test_core_and_contract_on_eight_devices():
    eight_devices.check("core", "multidevice and not slow")


@pytest.mark.slow
def test_contract_of_other_layouts_on_eight_devices():
    eight_devices.check("core", "multidevice and slow")


def test_every_file_is_in_one_group():
    grouped = [
        f"sharded_{name}_test.py" for names in eight_devices.GROUPS.values() for name in names
    ]
    assert sorted(grouped) == sorted(path.name for path in eight_devices.FOLDER.glob("*_test.py"))
