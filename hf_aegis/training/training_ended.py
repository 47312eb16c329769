"""What trainings end with, other than by the user's input or a defect."""


class TrainingEndedError(Exception):
    """
    A training ended before its last step, for a reason that is neither in its arguments nor a defect. The message says
    why, what to do, and from where it goes on. `hf-aegis` tells it without a traceback.
    """
