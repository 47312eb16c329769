"""
Generates damaged inputs from sound ones and shows that a reader refuses them with its own errors.

```python
from fuzz_engine import JSON, fuzz, reading

report = fuzz([sound], reading(tmp_path / "statistics.json", load_statistics), (ValueError, OSError), number=200,
              structured=JSON, naming="statistics.json")
report.check()
```
"""

from fuzz_engine.fuzzing import Report, fuzz, reading, replay
from fuzz_engine.mutations import JSON, JSON_LINES, Mutation, mutate_bytes, mutate_value
from fuzz_engine.reader_process import Finding


__all__ = [
    "JSON",
    "JSON_LINES",
    "Finding",
    "Mutation",
    "Report",
    "fuzz",
    "mutate_bytes",
    "mutate_value",
    "reading",
    "replay",
]
