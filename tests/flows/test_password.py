import re
import stat
from pathlib import Path

import pytest
from dotenv import dotenv_values

from flows.password import CLIENT, SERVER, get_password
from segmentation.errors import PipelineError


@pytest.fixture
def env(tmp_path, monkeypatch) -> Path:
    """Where `.env` of a checkout is, or will be."""
    for name in (SERVER, CLIENT):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".env"


def write(file: Path, text: str, mode: int = 0o600) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_password_is_written_for_its_owner_alone_and_stays(env):
    password = get_password(env)
    assert re.fullmatch("voc:[0-9a-f]{32}", password.value)
    assert dotenv_values(env) == {SERVER: password.value, CLIENT: password.value}
    assert mode(env) == 0o600
    assert [file.name for file in env.parent.iterdir()] == [".env"]
    before = env.read_bytes()
    assert get_password(env) == password
    assert env.read_bytes() == before


def test_two_checkouts_have_two_passwords(env, tmp_path):
    (tmp_path / "other").mkdir()
    assert get_password(env).value != get_password(tmp_path / "other" / ".env").value


def test_other_lines_stay_as_they_are(env):
    write(env, "# mine\nexport OTHER='a b'\nPOSTGRES_PASSWORD=x$y")
    password = get_password(env)
    assert env.read_text() == (
        f"# mine\nexport OTHER='a b'\nPOSTGRES_PASSWORD=x$y\n{SERVER}={password.value}\n{CLIENT}={password.value}\n"
    )


@pytest.mark.parametrize("name", [SERVER, CLIENT])
def test_a_password_of_the_users_is_kept_and_what_is_missing_is_added(env, name):
    write(env, f"{name}='me:secret'\n")
    assert get_password(env).value == "me:secret"
    assert dotenv_values(env) == {SERVER: "me:secret", CLIENT: "me:secret"}
    assert env.read_text().startswith(f"{name}='me:secret'\n")


def test_the_example_filled_in_or_not_serves_compose_and_the_services(env, root):
    example = (root / ".env.example").read_text()
    write(env, example)
    password = get_password(env)
    assert re.fullmatch("voc:[0-9a-f]{32}", password.value)
    assert env.read_text() == "".join(
        f"{line.split('=')[0]}={password.value}\n" if "AUTH_STRING=" in line else line
        for line in example.splitlines(keepends=True)
    )
    write(env, example.replace(f"{SERVER}=\n", f"{SERVER}=me:secret\n"))
    before = env.read_bytes()
    assert get_password(env).value == "me:secret"
    assert env.read_bytes() == before


@pytest.mark.parametrize("names", [(SERVER,), (CLIENT,), (SERVER, CLIENT)])
def test_a_password_of_the_environment_is_used_and_not_written_down(env, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, "me:secret")
    password = get_password(env)
    assert (password.value, password.place) == ("me:secret", f"{names[0]} in the environment")
    assert not env.exists()


def test_an_empty_variable_of_the_environment_is_none(env, monkeypatch):
    monkeypatch.setenv(CLIENT, "")
    write(env, f"{SERVER}=me:secret\n")
    assert get_password(env).value == "me:secret"


def test_two_passwords_are_refused_with_their_places(env, monkeypatch):
    write(env, f"{SERVER}=me:secret\n")
    monkeypatch.setenv(CLIENT, "company:secret")
    with pytest.raises(PipelineError) as refused:
        get_password(env)
    assert f"{SERVER} in {env} and {CLIENT} in the environment differ" in str(refused.value)
    assert ":secret" not in str(refused.value)


def test_a_file_that_others_can_read_is_closed_to_them(env, capsys):
    write(env, f"{SERVER}=me:secret\n{CLIENT}=me:secret\n", 0o644)
    get_password(env)
    assert mode(env) == 0o600
    assert f"{env}: others could read it" in capsys.readouterr().out


def test_a_link_stays_a_link(env, tmp_path):
    (tmp_path / "kept").mkdir()
    env.symlink_to("kept/passwords")
    get_password(env)
    assert env.is_symlink()
    assert mode(tmp_path / "kept" / "passwords") == 0o600


def test_where_nothing_can_be_written_is_said_with_the_remedy(env):
    env.symlink_to("/proc/passwords")  # where root cannot write either
    with pytest.raises(
        PipelineError, match=rf"/proc/passwords: .* cannot be kept there .* export {SERVER} and {CLIENT}"
    ):
        get_password(env)


def test_what_prefect_could_not_use_is_refused(env):
    write(env, f"{SERVER}=me:geheimniß\n")
    with pytest.raises(PipelineError, match=rf"{SERVER} in .*: use letters, digits and signs of ASCII only"):
        get_password(env)
    env.write_bytes(b"# caf\xe9\n")
    with pytest.raises(PipelineError, match=r"\.env: cannot be read .* make it UTF-8 text"):
        get_password(env)
    env.unlink()
    env.mkdir()
    with pytest.raises(PipelineError, match=r"\.env: this is not a file"):
        get_password(env)
