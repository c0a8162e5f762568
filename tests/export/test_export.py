from finetune.cli.main import main
from finetune.export.export_folder import open_export


def test_x(run, capsys):
    assert main(["export", str(run.path), "--to", "merged"]) == 0
    assert main(["export", str(run.path), "--to", "gguf"]) == 0
    assert main(["export", str(run.path), "--to", "adapter"]) == 0
    print(capsys.readouterr())
    for k in ("merged", "gguf", "adapter"):
        e = open_export(run.path / "exports" / k, verify=True)
        print(e.kind, sorted(p.name for p in e.path.iterdir()))
        print((e.path / "README.md").read_text())
        print((e.path / "export.json").read_text()[:1500])
    print((run.path / "exports/gguf/Modelfile").read_text())
    assert 0
