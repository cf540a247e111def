"""The list of secrets: the usual formats are caught by mask, scan and config alike, and what only
looks like one passes.

The samples are made when the test runs, from the forms that their makers publish, so that no
scanner of this repository stumbles over them. `{b:40}` in a form is 40 random letters and digits,
`h` hexadecimal, `d` digits, `w` also - and _, `u` capitals and digits, `l` lower case and digits,
`s` base64, `g` a UUID.
"""

import random
import re
import string
import time
from pathlib import Path

import pytest

from distill.cli import main
from distill.config.yaml_file import check_values
from distill.corpus.privacy import mask
from distill.errors import DistillError, Exit
from distill.publishing.secret_scan import scan
from distill.secret_patterns import FORMS, NAMES, find_secrets, fingerprint

SHAPES = {
    "OpenAI": "sk-{b:20}T3BlbkFJ{b:20}",
    "OpenAI project": "sk-proj-{w:74}T3BlbkFJ{w:74}",
    "OpenAI service account": "sk-svcacct-{w:74}T3BlbkFJ{w:74}",
    "Anthropic": "sk-ant-api03-{w:93}AA",
    "Anthropic administrator": "sk-ant-admin01-{w:93}AA",
    "OpenRouter": "sk-or-v1-{h:64}",
    "DeepSeek": "sk-{h:32}",
    "Langfuse": "sk-lf-{g:1}",
    "Hugging Face": "hf_{b:34}",
    "xAI": "xai-{b:80}",
    "Groq": "gsk_{b:52}",
    "Perplexity": "pplx-{b:48}",
    "NVIDIA": "nvapi-{w:64}",
    "Replicate": "r8_{b:37}",
    "Together": "tgp_v1_{w:43}",
    "Fireworks": "fw_{b:24}",
    "Cerebras": "csk-{l:48}",
    "LangSmith": "lsv2_pt_{h:32}_{h:10}",
    "Pinecone": "pcsk_{b:6}_{b:64}",
    "Tavily": "tvly-dev-{b:32}",
    "ElevenLabs": "sk_{h:48}",
    "Google": "AIza{w:35}",
    "Google OAuth": "ya29.a0{w:160}",
    "Google OAuth client": "GOCSPX-{w:28}",
    "AWS": "AKIA{u:16}",
    "AWS session": "ASIA{u:16}",
    "AWS secret": "aws_secret_access_key = {s:40}",
    "AWS Bedrock": "ABSK{s:124}",
    "Alibaba": "LTAI{b:20}",
    "DigitalOcean": "dop_v1_{h:64}",
    "DigitalOcean OAuth": "doo_v1_{h:64}",
    "Azure storage": "DefaultEndpointsProtocol=https;AccountName=a;"
    "AccountKey={s:86}==;EndpointSuffix=core",
    "Azure service bus": "Endpoint=sb://a.servicebus.windows.net/;SharedAccessKeyName=b;SharedAccessKey={s:43}=",
    "Azure signature": "https://a.blob.core.windows.net/b?sv=2024-01-01&sig={b:43}%3D",
    "Azure client": "{b:3}8Q~{w:34}",
    "Databricks": "dapi{h:32}",
    "Heroku": "HRKU-AA{w:58}",
    "Cloudflare": "CLOUDFLARE_API_TOKEN={w:40}",
    "Datadog": 'DD_API_KEY="{h:32}"',
    "Cohere": "export COHERE_API_KEY={b:40}",
    "GitHub": "ghp_{b:36}",
    "GitHub OAuth": "gho_{b:36}",
    "GitHub server": "ghs_{b:36}",
    "GitHub user": "ghu_{b:36}",
    "GitHub refresh": "ghr_{b:76}",
    "GitHub fine-grained": "github_pat_{b:22}_{b:59}",
    "GitLab": "glpat-{w:20}",
    "GitLab routable": "glpat-{w:27}.01.0{l:7}1",
    "GitLab deploy": "gldt-{w:20}",
    "GitLab runner": "glrt-{w:20}",
    "Bitbucket": "ATBB{b:32}",
    "Atlassian": "ATATT3xFfGF0{w:180}",
    "npm": "npm_{b:36}",
    "PyPI": "pypi-AgEIcHlwaS5vcmc{w:150}",
    "RubyGems": "rubygems_{h:48}",
    "crates.io": "cio{b:32}",
    "NuGet": "oy2{l:43}",
    "Docker": "dckr_pat_{w:27}",
    "JFrog": "AKCp{b:69}",
    "CircleCI": "CCIPAT_{b:22}_{h:40}",
    "Sourcegraph": "sgp_{h:40}",
    "Pulumi": "pul-{h:40}",
    "Terraform": "{b:14}.atlasv1.{w:67}",
    "Vault": "hvs.CAESI{w:90}",
    "Doppler": "dp.pt.{b:43}",
    "1Password": "ops_eyJ{s:300}",
    "age": "AGE-SECRET-KEY-1{age:58}",
    "Stripe": "sk_live_{b:24}",
    "Stripe restricted": "rk_live_{b:24}",
    "Stripe publishable": "pk_live_{b:24}",
    "Stripe webhook": "whsec_{b:32}",
    "Square": "sq0atp-{w:22}",
    "Square OAuth": "sq0csp-{w:43}",
    "Shopify": "shpat_{h:32}",
    "Braintree": "access_token$production${l:16}${h:32}",
    "Razorpay": "rzp_live_{b:14}",
    "Plaid": "access-production-{g:1}",
    "Slack": "xoxb-{d:12}-{d:13}-{b:24}",
    "Slack user": "xoxp-{d:12}-{d:12}-{d:12}-{h:32}",
    "Slack app": "xapp-1-A{u:10}-{d:13}-{h:64}",
    "Slack webhook": "https://hooks.slack.com/services/T{u:10}/B{u:10}/{b:24}",
    "Discord": "M{b:25}.{w:6}.{w:38}",
    "Discord webhook": "https://discord.com/api/webhooks/{d:18}/{w:68}",
    "Telegram": "{d:10}:AA{w:33}",
    "Teams": "https://a.webhook.office.com/webhookb2/{g:1}@{g:1}/IncomingWebhook/{h:32}/{g:1}",
    "Twilio": "SK{h:32}",
    "SendGrid": "SG.{w:22}.{w:43}",
    "Mailgun": "key-{h:32}",
    "Mailchimp": "{h:32}-us12",
    "Brevo": "xkeysib-{h:64}-{b:16}",
    "Resend": "re_{b:8}_{b:24}",
    "Facebook": "EAAC{b:160}",
    "Postman": "PMAK-{h:24}-{h:34}",
    "Linear": "lin_api_{b:40}",
    "Notion": "ntn_{d:11}{b:35}",
    "Notion, older": "secret_{b:43}",
    "Airtable": "pat{b:14}.{h:64}",
    "Figma": "figd_{w:40}",
    "HubSpot": "pat-na1-{g:1}",
    "Typeform": "tfp_{w:44}",
    "Mapbox": "sk.eyJ{b:60}.{w:22}",
    "Contentful": "CFPAT-{w:43}",
    "Okta": "Authorization: SSWS 00{w:40}",
    "Grafana": "glsa_{b:32}_{h:8}",
    "New Relic": "NRAK-{u:27}",
    "Sentry": "sntryu_{h:64}",
    "Dynatrace": "dt0c01.{u:24}.{u:64}",
    "Supabase": "sbp_{h:40}",
    "PlanetScale": "pscale_tkn_{w:43}",
    "Netlify": "nfp_{b:36}",
    "Tailscale": "tskey-auth-{b:16}-{b:32}",
    "JWT": "eyJ{b:33}.eyJ{b:60}.{w:43}",
    "bearer": "Authorization: Bearer {b:40}",
    "basic": "Authorization: Basic {s:24}==",
    "password in an address": "postgres://ada:{b:14}@db.internal:5432/a",
    "password of nobody in an address": "redis://:{b:20}@cache:6379/0",
    "token in an address": "https://{h:40}@git.internal/a.git",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\n{s:70}\n{s:70}\n"
    "-----END OPENSSH PRIVATE KEY-----",
    "private key, PKCS 8": "-----BEGIN PRIVATE KEY-----\n{s:64}\n{s:20}\n-----END PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{s:64}\n{s:40}\n=ab12\n"
    "-----END PGP PRIVATE KEY BLOCK-----",
}
ALPHABETS = {
    "b": string.ascii_letters + string.digits,
    "h": "0123456789abcdef",
    "d": string.digits,
    "w": string.ascii_letters + string.digits + "-_",
    "u": string.ascii_uppercase + string.digits,
    "l": string.ascii_lowercase + string.digits,
    "s": string.ascii_letters + string.digits + "+/",
    "age": "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L",
}
AROUND = ["{}", "before {} after", '{{"a": "{}"}}', "({}),", "line\n{}\nline", "\\n{}\\n"]

HARMLESS = [
    "sk-learn and scikit-learn, task-oriented, risk-free",
    "sk-learn-contrib-experiments-of-2024 in a folder",
    "sk-your-api-key-goes-here-please-1",
    "Bearer authentication is described in RFC 6750",
    "the Bearer scheme, Bearer tokens, Authorization: Bearer <token>",
    "Authorization: Bearer $OPENAI_API_KEY",
    "pk_ begins a public key; pk_ctx, sk_X509_EXTENSION_num, rk_table_of_contents",
    "pk_test_publishable_key_of_yours",
    "hf_hub_download and hf_transfer, HF_TOKEN",
    "npm_config_registry, npm_package_config_port_8080 and npm_lifecycle_event",
    "key-value stores, key-0 and key-derivation-function",
    "the header -----BEGIN PRIVATE KEY----- begins a file",
    "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUTWVkY0\n-----END CERTIFICATE-----",
    "AKIAIOSFODNN7EXAMPLE is the key of AWS's documentation",
    "AKIA, ASIA and AIza begin keys",
    "xoxb-your-bot-token and xapp-your-app-token",
    "eyJhbGciOiJIUzI1NiJ9 is the head of a JWT",
    "http://user:password@example.org and ftp://anonymous:secret@server.org",
    "https://user:${PASSWORD}@host, https://<token>@github.com, postgres://ada:***@db",
    "mailto:ada@example.org and https://example.org/@ada/posts",
    "git@github.com:owner/name.git and ssh://git@host/path",
    "OPENAI_API_KEY=your-key-here and api_key: str | None = None",
    "api_key = os.environ['OPENAI_API_KEY'], token=get_token()",
    "SECRET_KEY = getpass.getpass('the secret key of the application')",
    "password: correct horse battery staple",
    "re_match_object, re_compile_1, live_stream and test_that_everything_is_read_twice_2",
    "SK is Slovakia, SG. is short, EAA and EAAA stand in base64",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    '"adapter_sha256": "da39a3ee5e6b4b0d3255bfef95601890afd80709"',
    "550e8400-e29b-41d4-a716-446655440000 and commit 07339c8c1d5e0d1a6b0f9f6f5bb5fdf1b6b5a6a5",
    "Qwen2.5-Coder-0.5B-Instruct, SmolLM2-135M-Instruct, meta-llama/Llama-3.2-1B",
    "gsk_ and xai-org/grok-1-open-release-of-2024, nvapi- and pplx-",
    "dapi and dapi-client; dp.pt and dp.st; pat-na1; pul-requests",
    "figd_, ntn_, lin_api_ and PMAK- begin keys of services",
    "module.hvs.something, s.strip(), t1.join(), sl.index(1)",
    "datetime(2020, 2, 29, 12, 30, 45, 123456) and 1234567890:AB",
    "https://hooks.slack.com/services/ takes a POST; /api/webhooks/ID/TOKEN too",
    "AccountKey=<key>;EndpointSuffix=core.windows.net and SharedAccessKey=...",
    "https://api.openai.com/v1, https://huggingface.co/datasets/a/b?sig=none",
    "rotate the API key: SECRET is a word, TOKEN: too, KEY=value",
    "glpat- and ghp_ are prefixes, github_pat_ another",
    "LTAI, LTAIR and lthaiwords; cioccolata; patterns.of.behaviour",
]


def made(shape: str, seed: int) -> str:
    """Return a sample of a shape with random bodies."""
    chance = random.Random(f"{shape} {seed}")

    def body(found: re.Match[str]) -> str:
        kind, count = found[1], int(found[2])
        if kind == "g":
            return "-".join(
                "".join(chance.choices("0123456789abcdef", k=n)) for n in (8, 4, 4, 4, 12)
            )
        return "".join(chance.choices(ALPHABETS[kind], k=count))

    return re.sub(r"\{(\w+):(\d+)\}", body, shape)


def masked(text: str) -> bool:
    return bool({"key", "password"} & mask(text)[1].keys())


def scanned(text: str, folder: Path, *allowed: str) -> bool:
    (folder / "README.md").write_text(text)
    try:
        scan(folder, allowed=allowed)
    except DistillError as error:
        return error.code == Exit.PUBLISH
    return False


def refused(text: str, *allowed: str) -> bool:
    try:
        check_values({"a": text.replace("\n", " \n")}, "c.yaml", {}, allowed=allowed)
    except DistillError as error:
        return error.code == Exit.CONFIG and "secret" in error.what
    return False


def test_the_usual_formats_are_caught_by_all_three(tmp_path: Path) -> None:
    """H7: one list for corpus, config and release."""
    missed = {
        (name, place.__name__)
        for name, shape in SHAPES.items()
        for seed in range(5)
        for text in [made(shape, seed)]
        for place, caught in (
            (masked, masked(text)),
            (scanned, scanned(text, tmp_path)),
            (refused, refused(text)),
        )
        if not caught
    }
    assert missed == set() and len(SHAPES) > 100


@pytest.mark.parametrize("name", SHAPES)
def test_a_secret_is_found_wherever_it_stands(name: str) -> None:
    for around in AROUND:
        text = around.format(made(SHAPES[name], 7))
        assert [*find_secrets(text)], around
        hidden, _ = mask(text)
        assert not [*find_secrets(hidden)], "a part of it is left"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_passes(text: str, tmp_path: Path) -> None:
    assert [*find_secrets(text)] == []
    assert not scanned(text, tmp_path) and not masked(text)
    assert not refused(text) or "://" in text  # a config's addresses have no login at all


def test_forms_known_from_the_beginning_are_masked_as_ever() -> None:
    """A key before the password that it may be; other keys, which were passwords only, as
    passwords."""
    old, new = made(SHAPES["GitHub"], 1), made(SHAPES["Shopify"], 1)
    assert mask(f"https://u:{old}@h.org/x")[0] == "https://u:[KEY]@h.org/x"
    assert mask(f"https://u:{new}@h.org/x")[0] == "https://[PASSWORD]@h.org/x"
    assert mask(f"{old} {new}") == ("[KEY] [KEY]", {"key": 2})


def test_there_are_enough_of_both() -> None:
    assert len(HARMLESS) >= 40
    assert {secret.name for s in SHAPES.values() for secret in find_secrets(made(s, 1))} <= NAMES


def test_each_can_be_allowed_by_name_or_by_its_digest(tmp_path: Path) -> None:
    """H7: a false alarm has a way on."""
    text = f"a {made(SHAPES['GitLab'], 3)} b"
    (secret,) = find_secrets(text)
    mark = fingerprint(text[secret.start : secret.end])
    for allowed in (secret.name, mark[:8], f"sha256:{mark[:12]}", mark):
        assert not scanned(text, tmp_path, allowed) and not refused(text, allowed)
    for other in ("github-token", mark[:7], "sha256:", "", "f" * 12):
        assert scanned(text, tmp_path, other) and refused(text, other)
    with pytest.raises(DistillError) as caught:
        scan(tmp_path)
    assert f"publish.allow_secrets=[sha256:{mark[:12]}]" in caught.value.fix
    assert text[2:-2] not in str(caught.value)


CONFIG = """\
name: a
corpus: {path: sk-learn-experiments-of-2024}
teacher: {kind: recorded, model: somebody, license: CC0-1.0}
student: {model: smollm2-135m-instruct}
"""


def test_a_config_allows_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    key = made(SHAPES["Hugging Face"], 1)
    path.write_text(CONFIG.replace("sk-learn-experiments-of-2024", f"./{key}"))
    assert main(["corpus", str(path)]) == Exit.CONFIG
    line = capsys.readouterr().err
    (allow,) = re.findall(r"publish\.allow_secrets=\[sha256:\w{12}\]", line)
    assert key not in line
    assert main(["corpus", str(path), allow]) == Exit.INPUT  # the folder does not exist
    assert main(["corpus", str(path), "publish.allow_secrets=[huggingface-token]"]) == Exit.INPUT
    capsys.readouterr()
    path.write_text(CONFIG)  # whose path is none
    assert main(["corpus", str(path), "publish.allow_secrets=[huggingface-tokens]"]) == Exit.CONFIG
    assert "did you mean huggingface-token?" in capsys.readouterr().err


def test_other_keys_than_those_of_publish_are_no_overrides_of_publish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(tmp_path), "train.learning_rate=1"]) == Exit.CONFIG
    assert "is no key of publish" in capsys.readouterr().err


def test_every_form_has_its_sign_in_what_it_finds() -> None:
    samples = [made(shape, seed) for shape in SHAPES.values() for seed in range(3)]
    used = set()
    for form in FORMS:
        for text in samples:
            if form.pattern.search(text):
                used.add(form.name)
                assert any(sign in text for sign in form.signs), form.name
    assert len(used) > 90


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_no_form_takes_time_in_the_square_of_a_text(form) -> None:
    for sign in form.signs:
        for piece in (*(f"{sign}{end}" for end in ("", "a", "1", " ", "A1-", "=")), "a1", "A", "="):
            text = sign + piece * (60_000 // len(piece))
            started = time.process_time()
            for found in form.pattern.finditer(text):
                form.check(found)
            assert time.process_time() - started < 2, piece
