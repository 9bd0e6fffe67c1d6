"""A launch makes the device of its tensors current."""


def test_the_device_of_the_tensors_is_current_during_the_launch(interpreter):
    assert interpreter.call("tests.kernels.interpreted:device_of_run") == ((1,), ["in", "launch", "out"])
