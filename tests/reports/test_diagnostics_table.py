from hf_aegis.reports.diagnostics_table import PAPER_ROW, diagnostics_rows


def test_mean_and_range_over_steps_and_seeds():
    def log(*rates):
        return [{"throttle_rate": rate, "alpha": -0.5, "penalty": None} for rate in rates]

    header, rows = diagnostics_rows({"AEGIS": [log(0.1, 0.5), [*log(0.9), {"cosine": None}]], "A-GEM": [log(0)]})
    cells = dict(zip(header, rows[0], strict=True))
    assert cells[""] == "AEGIS"
    assert (cells["seeds"], cells["backward passes"]) == ("2", "4")
    assert cells["groups in conflict (%)"] == "50.0 (10.0 to 90.0)"
    assert cells["coefficient α"] == "−0.5 (−0.5 to −0.5)"
    # Nothing finite, and nothing logged.
    assert cells["transport penalty"] == cells["cosine"] == "–"
    assert [row[0] for row in rows] == ["AEGIS", "A-GEM", PAPER_ROW]
    assert all(len(row) == len(header) for row in rows)
    # Neither seeds nor passes are in the paper.
    assert rows[-1][1:3] == ["–", "1,500 steps"]
