"""What `benchmarks.gpu_tests` reads out of pytest's own report."""

from __future__ import annotations

from benchmarks.gpu_tests import rows_of

REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="one" time="1.5"/>
<testcase classname="tests.gpu.test_a" name="two" time="2"><failure message="off by 3&#10;more">long</failure></testcase>
<testcase classname="tests.gpu.test_b" name="three" time="0"><skipped/></testcase>
<testcase classname="tests.gpu.test_b" name="four" time="0"><error message="no GPU">long</error></testcase>
</testsuite></testsuites>"""


def test_counts_a_file_and_names_what_did_not_pass(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(REPORT)
    rows, failures = rows_of(junit)
    assert rows == [
        {"file": "test_a", "passed": 1, "failed": 1, "skipped": 0, "seconds": 4},
        {"file": "test_b", "passed": 0, "failed": 1, "skipped": 1, "seconds": 0},
        {"file": "all", "passed": 1, "failed": 2, "skipped": 1, "seconds": 4},
    ]
    assert failures == ["test_a::two: off by 3", "test_b::four: no GPU"]
