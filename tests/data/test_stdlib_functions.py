"""Functions of the standard library as prompts with ground truths."""

from hf_ebft.data import stdlib_functions


def test_functions_are_split_between_head_and_body() -> None:
    source = (
        "@decorated\n"
        "def plain(a,\n          b=1):\n    '''Says.'''\n    # why\n    total = a + b\n"
        "    return total\n\n"
        "class Some:\n    def one_line(self): return 'too close to its head to be told apart'\n"
        "    def method(self):\n        return self.method() + 1\n"
        "def only_a_docstring():\n    '''Nothing else.'''\n"
    )
    assert list(stdlib_functions.functions(source)) == [
        (
            "def plain(a,\n          b=1):\n    '''Says.'''\n    # why\n",
            "    total = a + b\n    return total\n",
        ),
        ("    def method(self):\n", "        return self.method() + 1\n"),
    ]
    assert list(stdlib_functions.functions("not Python(")) == []
    rows = stdlib_functions.load("general", "pretrain_eval")
    assert len(rows) > 5
    for row in rows:
        assert "def " in row["prompt"] and 20 <= len(row["ground_truth"]) <= 100
