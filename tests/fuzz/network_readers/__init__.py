"""Readers of what comes over the network, with sound inputs and mutations of their formats."""

from network_readers.hub_answers import hub_answers
from network_readers.messages import messages
from network_readers.pictures import pictures
from network_readers.questions import questions


__all__ = ["hub_answers", "messages", "pictures", "questions"]
