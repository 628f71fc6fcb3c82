"""ensemble-kit data download."""

import json

from youtube8m_site import youtube8m_site

from ensemble_kit.cli import main


def test_the_command_prints_what_came(tmp_path, runner):
    words = ["data", "download", "youtube8m", "--partition", "2/frame/train", "-o", str(tmp_path)]

    with youtube8m_site() as site:
        words += ["--base-url", site.url]
        result = runner.invoke(main, [*words, "--jobs", "2"])
        again = runner.invoke(main, [*words, "--json"])

    assert result.stdout == f"{tmp_path}\n4 files of records, 4 of them new\n", result.output
    assert json.loads(again.stdout)["num_new"] == 0
    result = runner.invoke(main, [*words, "--shard", "3,2"])
    assert result.exit_code == 2
    assert "'3,2' is no part of several, such as 1,100." in result.stderr
