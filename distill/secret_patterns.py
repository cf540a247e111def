"""Keys, tokens and passwords that are known by their form: for documents, configs and releases.

A form is its maker's prefix and the length and characters of what follows, as the makers document
them and as gitleaks lists them (MIT, https://github.com/gitleaks/gitleaks, July 2026). The list is
ours, and not a library's: what it finds is masked in documents before prompts are made, so a
library's next version would change texts that are paid for already. Every pattern takes time linear
in the text, and needs what prose does not have, so that `sk-learn` or "Bearer authentication" pass.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple


class Secret(NamedTuple):
    """A secret in a text: the name of its form, and where it stands."""

    name: str
    start: int
    end: int


class Form(NamedTuple):
    """Signs, one of which must be in a text; a pattern whose last group, or all, is the secret."""

    name: str
    signs: tuple[str, ...]
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], bool] = lambda match: True
    kind: str = "key"


def is_random(match: re.Match[str]) -> bool:
    """Tell a random body from words with hyphens or underscores and a number among them."""
    for part in re.split(r"[-_.~/+]", match[match.re.groups]):
        kinds = [any(map(test, part)) for test in (str.isdigit, str.islower, str.isupper)]
        if (len(part) >= 16 and kinds[0]) or (len(part) >= 8 and all(kinds)):
            return True
    return False


# A row of the tables below: a name, the prefixes, and a pattern of what follows them up to anything
# but a letter or digit. A pattern after `=` is complete, and the second column holds its signs. `?`
# after a name: a body that is not random, as words are not, only looks like one of this form. An
# indented line continues the one above.
START = r"(?:(?<![\w-])|(?<=\\[nrt]))"  # not inside a word; an escaped line end is no word
SHORTHANDS = {
    "<an>": "[A-Za-z0-9]",
    "<b64>": "[A-Za-z0-9+/]",
    "<hex>": "[0-9a-f]",
    "<is>": r"""["']?\s{0,3}[:=]\s{0,3}["']?""",
    "<uuid>": "[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
    "<w>": r"[\w-]",
}


def _forms(table: str) -> Iterator[Form]:
    for row in re.sub(r"\n {4}", "", re.sub(r"^#.*\n", "", table, flags=re.M)).strip().split("\n"):
        name, signs, pattern = row.split(None, 2)
        for short, full in SHORTHANDS.items():
            pattern = pattern.replace(short, full)
        if pattern.startswith("="):
            pattern = pattern[1:]
        else:
            prefixes = "|".join(map(re.escape, signs.split(",")))
            pattern = f"(?:{prefixes}){pattern}(?![A-Za-z0-9])"
        form = Form(name.rstrip("?"), tuple(signs.split(",")), re.compile(START + pattern))
        yield form._replace(check=is_random) if name.endswith("?") else form


PRIVATE_KEY = Form(
    "private-key",
    ("PRIVATE KEY",),
    re.compile(
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?:\\{1,2}[nr]|\s){1,4}"
        r"(?:[A-Za-z0-9+/]{20,80}={0,2}|[A-Za-z-]{3,20}: [\w ,./()-]{1,80}))++"
        r"(?:[\w+/=\\\s]{0,100}-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?"
    ),
)
# Documents were masked by these before there was a list. A changed pattern changes prompts that are
# paid for, and so does a changed order: what fits two forms is masked as the first of them.
FIRST = r"""
sk-key?                  sk-          =sk-(?=<w>{0,60}\d)<w>{20,300}
sk-key                   sk-          =sk-(?:lf-)?<uuid>(?!\w)
stripe-key               k_live_,k_test_ =[sr]k_(?:live|test)_\w{16,100}
stripe-webhook-secret    whsec_       =whsec_\w{20,100}
groq-key?                gsk_         =gsk_(?=<w>{0,40}\d)<w>{20,200}
xai-key?                 xai-         =xai-(?=<w>{0,40}\d)<w>{20,200}
perplexity-key?          pplx-        =pplx-(?=<w>{0,40}\d)<w>{20,200}
nvidia-key               nvapi-       =nvapi-(?=<w>{0,40}\d)<w>{20,200}
gitlab-token             glpat-       =glpat-(?=<w>{0,40}\d)<w>{20,200}
npm-token?               npm_         =npm_(?=<w>{0,40}\d)<w>{20,200}
digitalocean-token       dop_v1_      =dop_v1_(?=<w>{0,40}\d)<w>{20,200}
huggingface-token        hf_          =hf_<an>{20,100}
github-token             gho_,ghp_,ghs_,ghu_,ghr_ =gh[opsur]_<an>{20,255}
github-fine-grained-token github_pat_  =github_pat_\w{20,255}
pypi-token               pypi-AgE     =pypi-AgE<w>{50,300}
aws-access-key           AKIA,ASIA    =(?:AKIA|ASIA)(?![A-Z0-9]{9}EXAMPLE)[A-Z0-9]{16}\b
google-api-key           AIza         =AIza<w>{35}
slack-token              xox          =xox[abeoprs]-(?=<w>{0,60}\d)<w>{10,200}
jwt                      eyJ          =eyJ<w>{10,4000}+\.eyJ<w>{10,8000}+\.<w>{10,2000}
"""
PLACEHOLDER = re.compile(r"(?:pass(?:word|wd)?|pwd|secret|token|key|x+|\*+|\W.*)$", re.I)
ADDRESS_PASSWORD = Form(
    "address-password",
    ("://",),
    re.compile(r"(?<=://)([^\s/:@\"'<>\[\](){}$]{0,256}):([^\s/:@\"'<>{}$]{3,512})@"),
    lambda match: not (PLACEHOLDER.match(match[2]) or match[1] == match[2]),
    kind="password",
)
LATER = r"""
# makers of models, and what is used around them
langfuse-key             pk-lf-       <uuid>
sk-key                   sk-          =sk-[A-Za-z]{24,300}(?!<w>)
openrouter-key           sk-or-v1-    <hex>{64}
google-oauth-token       ya29.        <w>{20,500}
google-oauth-secret      GOCSPX-      <w>{28}
huggingface-organization-token api_org_     [A-Za-z]{34}
replicate-token          r8_          <an>{37}
langsmith-key            lsv2_pt_,lsv2_sk_ <hex>{32}_<hex>{10}
fireworks-key?           fw_          <an>{22,40}
together-key             tgp_v1_      <w>{43}
cerebras-key             csk-         [a-z0-9]{48}
pinecone-key             pcsk_        \w{50,100}
tavily-key?              tvly-        (?:dev-|prod-)?<an>{20,60}
jina-key                 jina_        <w>{50,80}
voyage-key?              pa-          <w>{43}
elevenlabs-key           sk_          <hex>{48}
e2b-key                  e2b_         <hex>{40}
wandb-key                wandb_v1_    \w{50,120}
posthog-key              phx_,phc_    <an>{40,60}
# forges, registries, builds, secret stores
gitlab-token gldt-,glptt-,glrt-,glcbt-,glft-,glimt-,glagent-,gloas-,glsoat-,glffct-
     (?:t\d_|<hex>{1,5}_)?<w>{20,300}
gitlab-registration-token GR1348941    <w>{20}
atlassian-token          ATATT3,ATCTT3 [\w=-]{100,250}
bitbucket-token          ATBB         <an>{32}
trello-token             ATTA         <hex>{64}
rubygems-token           rubygems_    <hex>{48}
clojars-token            CLOJARS_     [a-z0-9]{60}
nuget-key                oy2          [a-z0-9]{43}
docker-token             dckr_pat_,dckr_oat_ <w>{27,40}
crates-token?            cio          <an>{32}
sourcegraph-token        sgp_         (?:(?:<hex>{16}|local)_)?<hex>{40}
artifactory-key          AKCp         <an>{69}
artifactory-token        cmVmd        <an>{59}
circleci-token           CCIPAT_,CCIPRJ_ <an>{22}_<hex>{40}
buildkite-token          bkua_        <hex>{40}
pulumi-token             pul-         <hex>{40}
terraform-token          .atlasv1.    =<an>{14}\.atlasv1\.[\w=-]{60,70}
sonar-token              squ_,sqp_,sqa_ <hex>{40}
vault-token?             hvs.,hvb.,hvr. <w>{24,300}
doppler-token dp. =dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?<an>{40,44}
1password-token          ops_eyJ      <b64>{100,2000}={0,3}
1password-secret-key     A3-          (?:[A-Z0-9]{6}-){2}(?:[A-Z0-9]{5}-){2,3}[A-Z0-9]{5}
age-secret-key           AGE-SECRET-KEY-1 [0-9A-Z]{58}
prefect-key              pnu_,pnb_    <an>{36}
octopus-key?             API-         [A-Z0-9]{26,32}
infracost-key            ico-         <an>{32}
maxmind-key              _mmk         =<an>{6}_<an>{29}_mmk(?!\w)
harness-key              pat.,sat.    <w>{22}\.<an>{24}\.<an>{20}
# clouds
aws-access-key           ABIA,ACCA    [A-Z0-9]{16}
aws-secret-key? ecret,ECRET =(?i:(?:aws_?)?secret_?(?:access_?)?key)
    <is>(<b64>{40})(?![A-Za-z0-9/+=])
aws-bedrock-key          ABSK         <b64>{109,269}={0,2}
alibaba-key?             LTAI         <an>{12,24}
tencent-key              AKID         <an>{32}
yandex-key               AQVN         <w>{35,38}
yandex-token             t1.          <w>{10,500}={0,2}\.<w>{86}={0,2}
digitalocean-token       doo_v1_,dor_v1_ <hex>{64}
azure-storage-key        AccountKey=  =AccountKey=(<b64>{86}==)
azure-shared-key         SharedAccessKey= =SharedAccessKey=(<b64>{43}=)
azure-signature          sig=         =(?<=[?&;])sig=([A-Za-z0-9%/+]{43,80}(?:=|%3[Dd]))
azure-client-secret      Q~           =[\w~.]{3}\dQ~[\w~.-]{31,34}(?![\w~])
databricks-token         dapi         <hex>{32}(?:-\d)?
heroku-key               HRKU-        <w>{58,70}
fly-token                fo1_,fm1a_,fm1r_,fm2_ [\w+/-]{43,2000}={0,3}
cloudflare-ca-key        v1.0-        <hex>{24}-<hex>{146}
vercel-token             vcp_,vci_,vca_,vcr_,vck_ <an>{50,70}
netlify-token            nfp_         <an>{36,46}
render-key?              rnd_         <an>{28,36}
supabase-token           sbp_         (?:v0_)?<hex>{40}
supabase-key?            sb_secret_   <w>{24,60}
planetscale-token        pscale_tkn_,pscale_oauth_,pscale_pw_ [\w=.-]{32,64}
neon-key                 napi_        [a-z0-9]{60,70}
grafana-token            glsa_        <an>{32}_[A-Fa-f0-9]{8}
grafana-cloud-token      glc_         <b64>{32,400}={0,3}
newrelic-key?            NRAK-,NRII-,NRJS-,NRRA- <w>{19,42}
sentry-token             sntryu_      <hex>{64}
sentry-organization-token sntrys_eyJ   [\w+/=]{80,600}
dynatrace-token          dt0c01.,dt0s01.,dt0s16. <an>{24}\.<an>{64}
scaleway-key?            SCW          [A-Z0-9]{17}
openshift-token          sha256~      <w>{43}
clickhouse-key           4b1d         <an>{38}
tailscale-key            tskey-       (?:auth|api|client|scim|webhook)-<an>{8,24}-<an>{20,40}
firebase-key             AAAA         =AAAA<w>{7}:<w>{140}(?!\w)
cloudinary-address       cloudinary:// =cloudinary://\d{10,20}:(<w>{20,40})@
# payments, messages, tools
stripe-publishable-key?  pk_live_,pk_test_ <an>{16,100}
square-token             sq0atp-,sq0csp-,sq0idp- <w>{22,43}
square-access-token      EAAA         <w>{60}
shopify-token            shpat_,shpca_,shppa_,shpss_,shpua_ [a-fA-F0-9]{32}
braintree-token          access_token$ (?:production|sandbox)\$[0-9a-z]{16}\$<hex>{32}
razorpay-key             rzp_live_,rzp_test_ <an>{14}
plaid-token              access-      (?:sandbox|development|production)-<uuid>
flutterwave-key          FLWSECK-,FLWSECK_TEST- [0-9a-hA-H]{12,32}(?:-X)?
easypost-key             EZAK,EZTK    <an>{54}
shippo-token             shippo_live_,shippo_test_ [a-fA-F0-9]{40}
duffel-token             duffel_live_,duffel_test_ [\w=-]{43}
payment-key?             live_,test_  <an>{30,35}
slack-app-token          xapp-        \d-[A-Z0-9]{8,20}-\d{8,20}-[a-z0-9]{32,80}
slack-webhook hooks.slack.com/ =hooks\.slack\.com/((?:services|workflows|triggers)/<b64>{40,80})
discord-webhook          /api/webhooks/ =discord(?:app)?\.com/api/webhooks/(\d{15,21}/<w>{60,80})
discord-token?           .            =[MNO]<w>{23,27}\.<w>{6}\.<w>{27,40}(?!\w)
teams-webhook .webhook.office.com/ =<w>{1,60}\.webhook\.office\.com/
    (webhookb2/<uuid>@<uuid>/IncomingWebhook/\w{32}/<uuid>)
telegram-token           :AA          =\d{8,10}:AA<w>{33}(?!\w)
twilio-key               SK           <hex>{32}
sendgrid-key?            SG.          <w>{16,32}\.<w>{16,64}
mailgun-key              key-,pubkey- <hex>{32}
mailchimp-key            -us          =<hex>{32}-us\d{1,2}(?!\w)
brevo-key                xkeysib-,xsmtpsib- <hex>{64}-<an>{16}
resend-key?              re_          <an>{8}_<an>{20,32}
facebook-token           EAA          <an>{80,400}
twitter-token            AAAAAAAAAAAAAAAAAAAAA [\w%]{60,120}
postman-key              PMAK-        <hex>{24}-<hex>{34}
linear-key               lin_api_,lin_oauth_ <an>{40,64}
notion-token             ntn_         \d{11}<an>{35}
notion-secret?           secret_      <an>{43}
airtable-token           pat          <an>{14}\.<hex>{64}
hubspot-token            pat-         (?:na|eu|ap)\d?-<uuid>
figma-token              figd_        <w>{38,50}
typeform-token           tfp_         [\w=.-]{40,70}
mapbox-token             sk.eyJ,pk.eyJ,tk.eyJ <w>{20,200}\.<w>{20,60}
readme-key               rdme_        [a-z0-9]{70}
launchdarkly-key         sdk-,api-,mob- <uuid>
contentful-token         CFPAT-       <w>{43}
adobe-secret             p8e-         <w>{32}
frameio-token            fio-u-       [\w=-]{64}
dropbox-token            sl.          <w>{130,2000}
okta-token               SSWS         =SSWS\s{1,3}(00<w>{40})(?!\w)
asana-token              1/,2/        =[12]/\d{16}(?:/\d{16})?:<hex>{32}(?!\w)
# what is a secret by where it stands, if it is random
bearer-token?            earer,EARER  =(?i:bearer)[ \t]{1,4}([A-Za-z0-9._~+/-]{16,4000}+={0,2})
basic-authorization asic =(?i:authorization)<is>(?i:basic)[ \t]{1,4}(<b64>{12,400}={0,2})
assigned-secret? KEY,TOKEN,SECRET,PASSW,api_key,apikey,api-key,apiKey,Api-Key,ApiKey,client_secret,
    clientSecret,secret_key,secretKey,access_token,accessToken,auth_token,authToken
     =(?:[A-Z0-9_]{0,60}(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)
    |(?i:<w>{0,40}?(?:api[_-]?key|(?:client_?|app_?)secret|secret_?key|(?:access|auth)_?token)))
    <is>([\w/+.~-]{20,200}+={0,2})
"""
ADDRESS_TOKEN = Form(
    "address-token",
    ("://",),
    re.compile(r"(?<=://)([^\s/:@\"'<>\[\](){}$]{20,512}+)(?::x-oauth-basic)?@"),
    is_random,
)
PUTTY_KEY = Form(
    "putty-key",
    ("PuTTY-User-Key-File-",),
    re.compile(
        r"PuTTY-User-Key-File-[23]:[^\n]{0,200}+"
        r"(?:\n(?:[\w-]{1,40}: [^\n]{0,200}+|[A-Za-z0-9+/]{1,80}+={0,2}))++"
    ),
)
FORMS = (PRIVATE_KEY, *_forms(FIRST), ADDRESS_PASSWORD, *_forms(LATER), ADDRESS_TOKEN, PUTTY_KEY)
NAMES = frozenset(form.name for form in FORMS)
AROUND = ".,;:!?()\"'"  # what stands around the words of prose
SHORT = 500  # characters in which looking for each sign is quickest


def is_plain(word: str) -> bool:
    """Tell whether a word is letters, of which only the first may be a capital, as in prose."""
    bare = word.strip(AROUND)
    return bare.isalpha() and bare[1:] == bare[1:].lower()


# With each sign, whether it can stand in a plain word, or with white space between words
SIGNS = [
    (sign, place, " " in sign or is_plain(sign) or not sign.strip(AROUND))
    for place, form in enumerate(FORMS)
    for sign in form.signs
]


def has_sign(form: Form, text: str) -> bool:
    """Tell whether a sign of a form stands in a text."""
    return any(sign in text for sign in form.signs)


def forms_in(text: str) -> list[Form]:
    """Return the forms that may match in a text, by their signs, in the order of the list."""
    odd = text
    if (
        len(text) > SHORT
    ):  # most words hold no sign, and nothing but a sign's word may go on with it
        odd = " ".join(word for word in set(text.split()) if not is_plain(word))
    places = {place for sign, place, plain in SIGNS if sign in (text if plain else odd)}
    return [FORMS[place] for place in sorted(places)]


def find_secrets(text: str, allowed: Collection[str] = ()) -> Iterator[Secret]:
    """Yield every secret in a text, by form, except those allowed; two forms may find the same.

    Allowed are forms by their name, and single secrets by the beginning of their `fingerprint`, at
    least 8 digits of it, with or without `sha256:` before it (so that YAML takes it for no number).
    """
    beginnings = tuple(one.removeprefix("sha256:") for one in allowed if len(one) >= 8)
    for form in forms_in(text):
        if form.name in allowed:
            continue
        for match in form.pattern.finditer(text):
            secret = match[form.pattern.groups]
            if form.check(match) and not fingerprint(secret).startswith(beginnings):
                yield Secret(form.name, *match.span(form.pattern.groups))


def fingerprint(secret: str) -> str:
    """Return the SHA-256 of a secret, by which it is named and allowed without being repeated."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
