"""A stand-in for a trial of Ray Tune."""

from ray.tune.experiment import Trial


class TuneTrial:
    """Ray Tune's trial and controller as far as a scheduler touches them."""

    def __init__(self, trial_id):
        self.config, self.status = {"trial_id": trial_id}, Trial.PENDING

    def set_status(self, status):
        self.status = status

    def init_local_path(self):
        pass

    def set_config(self, config):
        self.config = config

    @staticmethod
    def stop_trial(trial):
        trial.status = Trial.TERMINATED
