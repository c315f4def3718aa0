from kvmpass.testing import Profile

DEVICES = ("nvme,addr=04.0,size=256M", "nvme,addr=05.0", "e1000e,addr=06.0", "e1000e,addr=07.0")


def pytest_kvmpass_profiles():
    return {"two-drives": Profile(devices=DEVICES, memory="2G")}
