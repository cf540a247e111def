"""The keys, tokens and passwords that are known by their form: one list for documents, configs and releases.

A form is its maker's prefix and the length and characters of what follows, as the makers document them and as gitleaks
lists them (MIT, https://github.com/gitleaks/gitleaks, July 2026). The list is ours, and not a library's: what it finds is
masked in documents before prompts are made, so a library's next version would change texts that are paid for already.
A text without any of the literal pieces of a form (`SIGNS`) is not searched for it. Every pattern takes time linear in
the text, and needs what prose does not have, so that `sk-learn`, `pk_` or "Bearer authentication" are none.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple


class Secret(NamedTuple):
    """A secret that was found: the name of its form, and where it stands."""

    name: str
    start: int
    end: int


class Form(NamedTuple):
    """One form: pieces of which one must stand in a text, and a pattern whose group, where it has one, is the secret.

    What only `looks` like one is told from it by a body that is random, as no words are.
    """

    name: str
    signs: tuple[str, ...]
    pattern: re.Pattern[str]
    looks: bool = False

    @property
    def group(self) -> int:
        """Return the number of the group that is the secret, the last one; 0 is the whole."""
        return self.pattern.groups

    def is_one(self, match: re.Match[str]) -> bool:
        """Tell whether what has the form is a secret, and neither words nor a placeholder."""
        if self.name == "address-password":
            return not (PLACEHOLDER.match(match[2]) or match[1] == match[2])
        return not self.looks or is_random(match[self.group])


START = (
    r"(?:(?<![\w-])|(?<=\\[nrt]))"  # not inside a word; an escaped line end before it is no word
)
HEX, UUID = "[0-9a-f]", "[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"


def _form(name: str, signs: str, pattern: str, looks: bool = False) -> Form:
    return Form(name, tuple(signs.split()), re.compile(START + pattern), looks)


def _after(name: str, prefixes: str, body: str, looks: bool = False) -> Form:
    """Return the form of a prefix, or several, and a body after which no letter or digit stands."""
    prefix = "|".join(map(re.escape, prefixes.split()))
    return _form(name, prefixes, rf"(?:{prefix}){body}(?![A-Za-z0-9])", looks)


PRIVATE_KEY = Form(
    "private-key",
    ("PRIVATE KEY",),
    re.compile(
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?:\\{1,2}[nr]|\s){1,4}(?:[A-Za-z0-9+/]{20,80}={0,2}|[A-Za-z-]{3,20}: [\w ,./()-]{1,80}))++"
        r"(?:[\w+/=\\\s]{0,100}-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?"
    ),
)
# Documents were masked by these before there was a list; a changed pattern changes prompts that are paid for.
FIRST = (
    PRIVATE_KEY,
    _form("sk-key", "sk-", r"sk-(?=[\w-]{0,60}\d)[\w-]{20,300}", looks=True),  # OpenAI and many
    _form("sk-key", "sk-", rf"sk-(?:lf-)?{UUID}(?!\w)"),  # Langfuse and others
    _form("stripe-key", "k_live_ k_test_", r"[sr]k_(?:live|test)_\w{16,100}"),
    _form("stripe-webhook-secret", "whsec_", r"whsec_\w{20,100}"),
    *(
        _form(name, prefix, rf"{prefix}(?=[\w-]{{0,40}}\d)[\w-]{{20,200}}", looks)
        for name, prefix, looks in (
            *(("groq-key", "gsk_", True), ("xai-key", "xai-", True)),
            *(("perplexity-key", "pplx-", True), ("nvidia-key", "nvapi-", False)),
            *(("gitlab-token", "glpat-", False), ("npm-token", "npm_", True)),
            ("digitalocean-token", "dop_v1_", False),
        )
    ),
    _form("huggingface-token", "hf_", r"hf_[A-Za-z0-9]{20,100}"),
    _form("github-token", "gho_ ghp_ ghs_ ghu_ ghr_", r"gh[opsur]_[A-Za-z0-9]{20,255}"),
    _form("github-fine-grained-token", "github_pat_", r"github_pat_\w{20,255}"),
    _form("pypi-token", "pypi-AgE", r"pypi-AgE[\w-]{50,300}"),
    # the keys of AWS's own documentation end in EXAMPLE
    _form("aws-access-key", "AKIA ASIA", r"(?:AKIA|ASIA)(?![A-Z0-9]{9}EXAMPLE)[A-Z0-9]{16}\b"),
    _form("google-api-key", "AIza", r"AIza[\w-]{35}"),
    _form("slack-token", "xox", r"xox[abeoprs]-(?=[\w-]{0,60}\d)[\w-]{10,200}"),
    _form("jwt", "eyJ", r"eyJ[\w-]{10,4000}+\.eyJ[\w-]{10,8000}+\.[\w-]{10,2000}"),
)
MODELS = (  # makers of models, and what is used around them
    _after("langfuse-key", "pk-lf-", UUID),
    _form("sk-key", "sk-", r"sk-[A-Za-z]{24,300}(?![\w-])"),  # no word is as long
    _after("openrouter-key", "sk-or-v1-", f"{HEX}{{64}}"),
    _after("google-oauth-token", "ya29.", r"[\w-]{20,500}"),
    _after("google-oauth-secret", "GOCSPX-", r"[\w-]{28}"),
    _after("huggingface-organization-token", "api_org_", r"[A-Za-z]{34}"),
    _after("replicate-token", "r8_", r"[A-Za-z0-9]{37}"),
    _after("langsmith-key", "lsv2_pt_ lsv2_sk_", f"{HEX}{{32}}_{HEX}{{10}}"),
    _after("fireworks-key", "fw_", r"[A-Za-z0-9]{22,40}", looks=True),
    _after("together-key", "tgp_v1_", r"[\w-]{43}"),
    _after("cerebras-key", "csk-", r"[a-z0-9]{48}"),
    _after("pinecone-key", "pcsk_", r"\w{50,100}"),
    _after("tavily-key", "tvly-", r"(?:dev-|prod-)?[A-Za-z0-9]{20,60}", looks=True),
    _after("jina-key", "jina_", r"[\w-]{50,80}"),
    _after("voyage-key", "pa-", r"[\w-]{43}", looks=True),
    _after("elevenlabs-key", "sk_", f"{HEX}{{48}}"),
    _after("e2b-key", "e2b_", f"{HEX}{{40}}"),
    _after("wandb-key", "wandb_v1_", r"\w{50,120}"),
    _after("posthog-key", "phx_ phc_", r"[A-Za-z0-9]{40,60}"),
)
CODE = (  # forges, registries, builds, secret stores
    _after(
        "gitlab-token",
        "gldt- glptt- glrt- glcbt- glft- glimt- glagent- gloas- glsoat- glffct-",
        r"(?:t\d_|[0-9a-f]{1,5}_)?[\w-]{20,300}",
    ),
    _after("gitlab-registration-token", "GR1348941", r"[\w-]{20}"),
    _after("atlassian-token", "ATATT3 ATCTT3", r"[\w=-]{100,250}"),
    _after("bitbucket-token", "ATBB", r"[A-Za-z0-9]{32}"),
    _after("trello-token", "ATTA", f"{HEX}{{64}}"),
    _after("rubygems-token", "rubygems_", f"{HEX}{{48}}"),
    _after("clojars-token", "CLOJARS_", r"[a-z0-9]{60}"),
    _after("nuget-key", "oy2", r"[a-z0-9]{43}"),
    _after("docker-token", "dckr_pat_ dckr_oat_", r"[\w-]{27,40}"),
    _after("crates-token", "cio", r"[A-Za-z0-9]{32}", looks=True),
    _after("sourcegraph-token", "sgp_", f"(?:(?:{HEX}{{16}}|local)_)?{HEX}{{40}}"),
    _after("artifactory-key", "AKCp", r"[A-Za-z0-9]{69}"),
    _after("artifactory-token", "cmVmd", r"[A-Za-z0-9]{59}"),
    _after("circleci-token", "CCIPAT_ CCIPRJ_", f"[A-Za-z0-9]{{22}}_{HEX}{{40}}"),
    _after("buildkite-token", "bkua_", f"{HEX}{{40}}"),
    _after("pulumi-token", "pul-", f"{HEX}{{40}}"),
    _form("terraform-token", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,70}"),
    _after("sonar-token", "squ_ sqp_ sqa_", f"{HEX}{{40}}"),
    _after("vault-token", "hvs. hvb. hvr.", r"[\w-]{24,300}", looks=True),
    _form(
        "doppler-token",
        "dp.",
        r"dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,44}",
    ),
    _after("1password-token", "ops_eyJ", r"[A-Za-z0-9+/]{100,2000}={0,3}"),
    _after("1password-secret-key", "A3-", r"(?:[A-Z0-9]{6}-){2}(?:[A-Z0-9]{5}-){2,3}[A-Z0-9]{5}"),
    _after("age-secret-key", "AGE-SECRET-KEY-1", r"[0-9A-Z]{58}"),
    _after("prefect-key", "pnu_ pnb_", r"[A-Za-z0-9]{36}"),
    _after("octopus-key", "API-", r"[A-Z0-9]{26,32}", looks=True),
    _after("infracost-key", "ico-", r"[A-Za-z0-9]{32}"),
    _form("maxmind-key", "_mmk", r"[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk(?!\w)"),
    _after("harness-key", "pat. sat.", r"[\w-]{22}\.[A-Za-z0-9]{24}\.[A-Za-z0-9]{20}"),
)
CLOUDS = (
    _after("aws-access-key", "ABIA ACCA", r"[A-Z0-9]{16}"),
    _form(
        "aws-secret-key",
        "ecret ECRET",
        r"(?i:(?:aws_?)?secret_?(?:access_?)?key)[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
        r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        looks=True,
    ),
    _after("aws-bedrock-key", "ABSK", r"[A-Za-z0-9+/]{109,269}={0,2}"),
    _after("alibaba-key", "LTAI", r"[A-Za-z0-9]{12,24}", looks=True),
    _after("tencent-key", "AKID", r"[A-Za-z0-9]{32}"),
    _after("yandex-key", "AQVN", r"[\w-]{35,38}"),
    _after("yandex-token", "t1.", r"[\w-]{10,500}={0,2}\.[\w-]{86}={0,2}"),
    _after("digitalocean-token", "doo_v1_ dor_v1_", f"{HEX}{{64}}"),
    _form("azure-storage-key", "AccountKey=", r"AccountKey=([A-Za-z0-9+/]{86}==)"),
    _form("azure-shared-key", "SharedAccessKey=", r"SharedAccessKey=([A-Za-z0-9+/]{43}=)"),
    _form("azure-signature", "sig=", r"(?<=[?&;])sig=([A-Za-z0-9%/+]{43,80}(?:=|%3[Dd]))"),
    _form("azure-client-secret", "Q~", r"[\w~.]{3}\dQ~[\w~.-]{31,34}(?![\w~])"),
    _after("databricks-token", "dapi", rf"{HEX}{{32}}(?:-\d)?"),
    _after("heroku-key", "HRKU-", r"[\w-]{58,70}"),
    _after("fly-token", "fo1_ fm1a_ fm1r_ fm2_", r"[\w+/-]{43,2000}={0,3}"),
    _after("cloudflare-ca-key", "v1.0-", f"{HEX}{{24}}-{HEX}{{146}}"),
    _after("vercel-token", "vcp_ vci_ vca_ vcr_ vck_", r"[A-Za-z0-9]{50,70}"),
    _after("netlify-token", "nfp_", r"[A-Za-z0-9]{36,46}"),
    _after("render-key", "rnd_", r"[A-Za-z0-9]{28,36}", looks=True),
    _after("supabase-token", "sbp_", f"(?:v0_)?{HEX}{{40}}"),
    _after("supabase-key", "sb_secret_", r"[\w-]{24,60}", looks=True),
    _after("planetscale-token", "pscale_tkn_ pscale_oauth_ pscale_pw_", r"[\w=.-]{32,64}"),
    _after("neon-key", "napi_", r"[a-z0-9]{60,70}"),
    _after("grafana-token", "glsa_", r"[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}"),
    _after("grafana-cloud-token", "glc_", r"[A-Za-z0-9+/]{32,400}={0,3}"),
    _after("newrelic-key", "NRAK- NRII- NRJS- NRRA-", r"[\w-]{19,42}", looks=True),
    _after("sentry-token", "sntryu_", f"{HEX}{{64}}"),
    _after("sentry-organization-token", "sntrys_eyJ", r"[\w+/=]{80,600}"),
    _after("dynatrace-token", "dt0c01. dt0s01. dt0s16.", r"[A-Za-z0-9]{24}\.[A-Za-z0-9]{64}"),
    _after("scaleway-key", "SCW", r"[A-Z0-9]{17}", looks=True),
    _after("openshift-token", "sha256~", r"[\w-]{43}"),
    _after("clickhouse-key", "4b1d", r"[A-Za-z0-9]{38}"),
    _after(
        "tailscale-key",
        "tskey-",
        r"(?:auth|api|client|scim|webhook)-[A-Za-z0-9]{8,24}-[A-Za-z0-9]{20,40}",
    ),
    _form("firebase-key", "AAAA", r"AAAA[\w-]{7}:[\w-]{140}(?!\w)"),
    _form("cloudinary-address", "cloudinary://", r"cloudinary://\d{10,20}:([\w-]{20,40})@"),
)
SERVICES = (  # payments, messages, tools
    _after("stripe-publishable-key", "pk_live_ pk_test_", r"[A-Za-z0-9]{16,100}", looks=True),
    _after("square-token", "sq0atp- sq0csp- sq0idp-", r"[\w-]{22,43}"),
    _after("square-access-token", "EAAA", r"[\w-]{60}"),
    _after("shopify-token", "shpat_ shpca_ shppa_ shpss_ shpua_", r"[a-fA-F0-9]{32}"),
    _after(
        "braintree-token", "access_token$", rf"(?:production|sandbox)\$[0-9a-z]{{16}}\${HEX}{{32}}"
    ),
    _after("razorpay-key", "rzp_live_ rzp_test_", r"[A-Za-z0-9]{14}"),
    _after("plaid-token", "access-", f"(?:sandbox|development|production)-{UUID}"),
    _after("flutterwave-key", "FLWSECK-  FLWSECK_TEST-", r"[0-9a-hA-H]{12,32}(?:-X)?"),
    _after("easypost-key", "EZAK EZTK", r"[A-Za-z0-9]{54}"),
    _after("shippo-token", "shippo_live_ shippo_test_", r"[a-fA-F0-9]{40}"),
    _after("duffel-token", "duffel_live_ duffel_test_", r"[\w=-]{43}"),
    _after("payment-key", "live_ test_", r"[A-Za-z0-9]{30,35}", looks=True),  # Mollie, Lob
    _after("slack-app-token", "xapp-", r"\d-[A-Z0-9]{8,20}-\d{8,20}-[a-z0-9]{32,80}"),
    _form(
        "slack-webhook",
        "hooks.slack.com/",
        r"hooks\.slack\.com/((?:services|workflows|triggers)/[A-Za-z0-9+/]{40,80})",
    ),
    _form(
        "discord-webhook",
        "/api/webhooks/",
        r"discord(?:app)?\.com/api/webhooks/(\d{15,21}/[\w-]{60,80})",
    ),
    _form("discord-token", ".", r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}(?!\w)", looks=True),
    _form(
        "teams-webhook",
        ".webhook.office.com/",
        rf"[\w-]{{1,60}}\.webhook\.office\.com/(webhookb2/{UUID}@{UUID}/IncomingWebhook/\w{{32}}/{UUID})",
    ),
    _form("telegram-token", ":AA", r"\d{8,10}:AA[\w-]{33}(?!\w)"),
    _after("twilio-key", "SK", f"{HEX}{{32}}"),
    _after("sendgrid-key", "SG.", r"[\w-]{16,32}\.[\w-]{16,64}", looks=True),
    _after("mailgun-key", "key- pubkey-", f"{HEX}{{32}}"),
    _form("mailchimp-key", "-us", rf"{HEX}{{32}}-us\d{{1,2}}(?!\w)"),
    _after("brevo-key", "xkeysib- xsmtpsib-", rf"{HEX}{{64}}-[A-Za-z0-9]{{16}}"),
    _after("resend-key", "re_", r"[A-Za-z0-9]{8}_[A-Za-z0-9]{20,32}", looks=True),
    _after("facebook-token", "EAA", r"[A-Za-z0-9]{80,400}"),
    _after("twitter-token", "AAAAAAAAAAAAAAAAAAAAA", r"[\w%]{60,120}"),
    _after("postman-key", "PMAK-", f"{HEX}{{24}}-{HEX}{{34}}"),
    _after("linear-key", "lin_api_ lin_oauth_", r"[A-Za-z0-9]{40,64}"),
    _after("notion-token", "ntn_", r"\d{11}[A-Za-z0-9]{35}"),
    _after("notion-secret", "secret_", r"[A-Za-z0-9]{43}", looks=True),
    _after("airtable-token", "pat", rf"[A-Za-z0-9]{{14}}\.{HEX}{{64}}"),
    _after("hubspot-token", "pat-", rf"(?:na|eu|ap)\d?-{UUID}"),
    _after("figma-token", "figd_", r"[\w-]{38,50}"),
    _after("typeform-token", "tfp_", r"[\w=.-]{40,70}"),
    _after("mapbox-token", "sk.eyJ pk.eyJ tk.eyJ", r"[\w-]{20,200}\.[\w-]{20,60}"),
    _after("readme-key", "rdme_", r"[a-z0-9]{70}"),
    _after("launchdarkly-key", "sdk- api- mob-", UUID),
    _after("contentful-token", "CFPAT-", r"[\w-]{43}"),
    _after("adobe-secret", "p8e-", r"[\w-]{32}"),
    _after("frameio-token", "fio-u-", r"[\w=-]{64}"),
    _after("dropbox-token", "sl.", r"[\w-]{130,2000}"),
    _form("okta-token", "SSWS", r"SSWS\s{1,3}(00[\w-]{40})(?!\w)"),
    _form("asana-token", "1/ 2/", rf"[12]/\d{{16}}(?:/\d{{16}})?:{HEX}{{32}}(?!\w)"),
)
PLACES = (  # what is a secret by where it stands, if it is random
    _form(
        "bearer-token",
        "earer EARER",
        r"(?i:bearer)[ \t]{1,4}([A-Za-z0-9._~+/-]{16,4000}+={0,2})",
        looks=True,
    ),
    _form(
        "basic-authorization",
        "asic",
        r"(?i:authorization)[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?i:basic)[ \t]{1,4}([A-Za-z0-9+/]{12,400}={0,2})",
    ),
    _form(
        "assigned-secret",
        "KEY TOKEN SECRET PASSW api_key apikey api-key apiKey Api-Key ApiKey client_secret clientSecret"
        " secret_key secretKey access_token accessToken auth_token authToken",
        r"(?:[A-Z0-9_]{0,60}(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)"
        r"|(?i:[\w-]{0,40}?(?:api[_-]?key|(?:client_?|app_?)secret|secret_?key|(?:access|auth)_?token)))"
        r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([\w/+.~-]{20,200}+={0,2})",
        looks=True,
    ),
    Form(
        "address-token",
        ("://",),
        re.compile(r"(?<=://)([^\s/:@\"'<>\[\](){}$]{20,512}+)(?::x-oauth-basic)?@"),
        looks=True,
    ),
    Form(
        "putty-key",
        ("PuTTY-User-Key-File-",),
        re.compile(
            r"PuTTY-User-Key-File-[23]:[^\n]{0,200}+(?:\n(?:[\w-]{1,40}: [^\n]{0,200}+|[A-Za-z0-9+/]{1,80}+={0,2}))++"
        ),
    ),
)
LATER = (*MODELS, *CODE, *CLOUDS, *SERVICES, *PLACES)
ADDRESS_PASSWORD = Form(
    "address-password",
    ("://",),
    re.compile(r"(?<=://)([^\s/:@\"'<>\[\](){}$]{0,256}):([^\s/:@\"'<>{}$]{3,512})@"),
)
FORMS = (*FIRST, ADDRESS_PASSWORD, *LATER)
NAMES = frozenset(form.name for form in FORMS)
PLACEHOLDER = re.compile(r"(?:pass(?:word|wd)?|pwd|secret|token|key|x+|\*+|\W.*)$", re.I)


def is_random(text: str) -> bool:
    """Tell a random body from words with hyphens or underscores and a number among them."""
    for part in re.split(r"[-_.~/+]", text):
        kinds = [any(map(test, part)) for test in (str.isdigit, str.islower, str.isupper)]
        if (len(part) >= 16 and kinds[0]) or (len(part) >= 8 and all(kinds)):
            return True
    return False


def find_secrets(text: str, allowed: Collection[str] = ()) -> Iterator[Secret]:
    """Yield every secret in a text, by form, but those that are allowed; two forms may find the same.

    Allowed are forms by their name, and single secrets by the beginning of their `fingerprint`, at least 8 digits of it,
    with or without `sha256:` before it (which keeps YAML from taking it for a number).
    """
    for form in FORMS:
        if form.name in allowed or not any(sign in text for sign in form.signs):
            continue
        for match in form.pattern.finditer(text):
            if form.is_one(match):
                start, end = match.span(form.group)
                mark = fingerprint(text[start:end])
                beginnings = (one.removeprefix("sha256:") for one in allowed if len(one) >= 8)
                if not any(map(mark.startswith, beginnings)):
                    yield Secret(form.name, start, end)


def mask_secrets(text: str, forms: Iterable[Form], mask: str) -> tuple[str, int]:
    """Put `mask` in the place of each secret of these forms; return the text and how many there were."""
    count = 0
    for form in forms:
        if not any(sign in text for sign in form.signs):
            continue

        def masked(match: re.Match[str], form: Form = form) -> str:
            nonlocal count
            if not form.is_one(match):
                return match[0]
            count += 1
            start, end = (place - match.start() for place in match.span(form.group))
            return match[0][:start] + mask + match[0][end:]

        text = form.pattern.sub(masked, text)
    return text, count


def fingerprint(secret: str) -> str:
    """Return the SHA-256 of a secret, by which it is named and allowed without being repeated."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
