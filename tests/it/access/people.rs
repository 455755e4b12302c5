//! People: JWTs of the sign-in service, by its secret or by its published keys, and what a bad provider can do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use chrono::Utc;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use opsmantik::access::jwks::JwksConfig;
use opsmantik::access::{Denied, Gate, UserTokens};
use opsmantik::domain::access::Caller;
use opsmantik::domain::id::UserId;
use opsmantik::store::Store;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use uuid::Uuid;

pub const SECRET: &str = "a-secret-of-a-test-that-has-32-bytes-or-more";
pub const USER: UserId = UserId::from_uuid(Uuid::from_u128(0x0153));

fn claims() -> Value {
    json!({"sub": USER, "exp": Utc::now().timestamp() + 300, "aud": "authenticated", "role": "authenticated",
        "iss": "https://p.supabase.co/auth/v1", "email": "nobody@example.com", "user_metadata": {"a": 1}})
}

fn with(change: &Value) -> Value {
    let mut claims = claims();
    for (name, value) in change.as_object().expect("an object") {
        let all = claims.as_object_mut().expect("an object");
        if value.is_null() {
            all.remove(name)
        } else {
            all.insert(name.clone(), value.clone())
        };
    }
    claims
}

fn sign(algorithm: Algorithm, kid: Option<&str>, claims: &Value, key: &EncodingKey) -> String {
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) };
    jsonwebtoken::encode(&header, claims, key).expect("a test's own token")
}

fn hs256(claims: &Value, secret: &[u8]) -> String {
    sign(Algorithm::HS256, None, claims, &EncodingKey::from_secret(secret))
}

/// The JWT of a signed-in person.
pub fn good(secret: &str) -> String {
    hs256(&claims(), secret.as_bytes())
}

async fn gate(users: UserTokens) -> Gate {
    // People are proven without the database.
    let store = Store::new("postgres://nobody@127.0.0.1:1/none", 1).await.expect("a URL");
    Gate::new(store).with_users(&users).expect("a client")
}

async fn is_user(gate: &Gate, jwt: &str) -> bool {
    match gate.admit(jwt).await {
        Ok(admission) => {
            assert_eq!(**admission.caller(), Caller::User { id: USER });
            true
        }
        Err(Denied::Invalid) => false,
        Err(other) => panic!("{other}"),
    }
}

fn secret_only() -> UserTokens {
    UserTokens { secret: SECRET.parse().ok(), ..UserTokens::default() }
}

#[tokio::test]
async fn a_person_comes_in_by_the_secret_and_everything_odd_about_their_token_keeps_them_out() {
    let gate = gate(secret_only()).await;
    let now = Utc::now().timestamp();
    for fine in [
        json!({}),
        json!({"aud": ["else", "authenticated"]}),
        json!({"nbf": now - 5}),
        json!({"nbf": now + 2}),
        json!({"exp": now - 2}),
        json!({"exp": now as f64 + 10.5}),
        json!({"iss": null}),
    ] {
        assert!(is_user(&gate, &hs256(&with(&fine), SECRET.as_bytes())).await, "{fine}");
    }
    for bad in [
        json!({"sub": null}),
        json!({"sub": "not-a-uuid"}),
        json!({"sub": 7}),
        json!({"sub": USER.as_uuid().simple().to_string()}),
        json!({"exp": null}),
        json!({"exp": now - 20}),
        json!({"exp": "2999-01-01"}),
        json!({"exp": (now + 300).to_string()}),
        json!({"nbf": now + 60}),
        json!({"nbf": "now"}),
        json!({"aud": null}),
        json!({"aud": "anon"}),
        json!({"aud": []}),
        json!({"aud": ["authenticate", "d"]}),
        json!({"role": null}),
        json!({"role": "anon"}),
        json!({"role": "service_role"}),
        json!({"role": ["authenticated"]}),
        json!({"role": "anon", "sub": null, "aud": null, "iss": "supabase", "ref": "p"}),
        json!({"role": "service_role", "sub": null, "aud": null, "iss": "supabase", "ref": "p"}),
    ] {
        assert!(!is_user(&gate, &hs256(&with(&bad), SECRET.as_bytes())).await, "{bad}");
    }
    assert!(!is_user(&gate, &good("another-secret-that-has-32-bytes-or-more")).await);
    for other in [Algorithm::HS384, Algorithm::HS512] {
        let jwt = sign(other, None, &claims(), &EncodingKey::from_secret(SECRET.as_bytes()));
        assert!(!is_user(&gate, &jwt).await, "{other:?}");
    }
    let jwt = good(SECRET);
    let [head, body, signature] = jwt.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let other_body = encode(&with(&json!({"sub": Uuid::from_u128(1)})));
    for forged in [
        format!("{head}.{other_body}.{signature}"),
        format!("{head}.{body}."),
        format!("{head}.{body}"),
        format!("{head}.{body}.{signature}.{signature}"),
        format!("{}.{body}.", encode(&json!({"alg": "none"}))),
        format!("{}.{body}.{signature}", encode(&json!({"alg": "none"}))),
        format!("{}.{body}.{signature}", encode(&json!({"typ": "JWT"}))),
        format!(".{body}.{signature}"),
        "..".to_owned(),
        hs256(&with(&json!({"user_metadata": {"a": "x".repeat(9000)}})), SECRET.as_bytes()),
    ] {
        assert!(!is_user(&gate, &forged).await, "{forged:.120}");
    }
    // A signature over a head that asks for what we do not understand.
    let critical = format!("{}.{body}", encode(&json!({"alg": "HS256", "crit": ["exp"], "exp": 1})));
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let signature = jsonwebtoken::crypto::sign(critical.as_bytes(), &key, Algorithm::HS256).expect("signed");
    assert!(!is_user(&gate, &format!("{critical}.{signature}")).await);
}

#[tokio::test]
async fn without_a_secret_or_keys_no_jwt_is_taken_and_the_issuer_counts_if_it_is_set() {
    assert!(!is_user(&gate(UserTokens::default()).await, &good(SECRET)).await);
    let issuer = |issuer: &str| UserTokens { issuer: Some(issuer.to_owned()), ..secret_only() };
    assert!(is_user(&gate(issuer("https://p.supabase.co/auth/v1")).await, &good(SECRET)).await);
    let strict = gate(issuer("https://q.supabase.co/auth/v1")).await;
    assert!(!is_user(&strict, &good(SECRET)).await);
    assert!(!is_user(&strict, &hs256(&with(&json!({"iss": null})), SECRET.as_bytes())).await);
}

#[tokio::test]
async fn a_persons_stream_ends_with_their_jwt() {
    let gate = gate(secret_only()).await;
    let jwt = hs256(&with(&json!({"exp": Utc::now().timestamp() - 3})), SECRET.as_bytes());
    let stream = gate.admit(&jwt).await.expect("within the leeway");
    assert!(stream.renew().await.is_ok());
    tokio::time::sleep(Duration::from_millis(3100)).await;
    assert!(matches!(stream.renew().await, Err(Denied::Invalid)));
}

/// A key pair of the sign-in service.
struct Pair {
    kid: &'static str,
    algorithm: Algorithm,
    key: EncodingKey,
}

impl Pair {
    fn es256(kid: &'static str) -> Self {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let pair = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        Self { kid, algorithm: Algorithm::ES256, key: EncodingKey::from_ec_der(pair.as_ref()) }
    }

    fn rs256(kid: &'static str) -> Self {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
        let pkcs8: Pkcs8V1Der<'static> = pair.as_der().expect("its bytes");
        // PKCS#1 is what PKCS#8 wraps, behind 26 bytes for a key of this size.
        Self { kid, algorithm: Algorithm::RS256, key: EncodingKey::from_rsa_der(&pkcs8.as_ref()[26..]) }
    }

    fn jwk(&self) -> Value {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).expect("a public key");
        jwk.common.key_id = Some(self.kid.to_owned());
        serde_json::to_value(jwk).expect("JSON")
    }

    fn jwt(&self) -> String {
        sign(self.algorithm, Some(self.kid), &claims(), &self.key)
    }
}

#[derive(Clone)]
enum Answer {
    Text(u16, String),
    Never,
    HangUp,
}

/// The sign-in service's address of keys.
struct Provider {
    answer: watch::Sender<Answer>,
    asked: Arc<AtomicU32>,
    config: JwksConfig,
}

impl Provider {
    async fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/auth/v1/.well-known/jwks.json", listener.local_addr().expect("bound"));
        let (answer, answers) = watch::channel(answer);
        let asked = Arc::<AtomicU32>::default();
        let count = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let answer = answers.borrow().clone();
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    let _ = stream.read(&mut request).await;
                    match answer {
                        Answer::HangUp => {}
                        Answer::Never => tokio::time::sleep(Duration::from_secs(60)).await,
                        Answer::Text(status, body) => {
                            let head = format!(
                                "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                                body.len()
                            );
                            let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
                        }
                    }
                });
            }
        });
        let config = JwksConfig {
            patience: Duration::from_millis(500),
            keep_for: Duration::from_secs(60),
            retry_after: Duration::from_secs(60),
            ask_gap: Duration::from_millis(800),
            ..JwksConfig::new(url.parse().expect("a URL"))
        };
        Self { answer, asked, config }
    }

    async fn with(pairs: &[&Pair]) -> Self {
        Self::start(Self::set(pairs)).await
    }

    fn set(pairs: &[&Pair]) -> Answer {
        let keys: Vec<Value> = pairs.iter().map(|pair| pair.jwk()).collect();
        Answer::Text(200, json!({"keys": keys}).to_string())
    }

    fn users(&self) -> UserTokens {
        UserTokens { jwks: Some(self.config.clone()), ..UserTokens::default() }
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

/// Longer than the gap between two fetches that tokens cause.
async fn gap() {
    tokio::time::sleep(Duration::from_millis(850)).await;
}

#[tokio::test]
async fn published_keys_prove_a_person_by_kid_and_an_unknown_one_is_asked_for_now_and_then() {
    let (ec, rsa, late) = (Pair::es256("ec"), Pair::rs256("rsa"), Pair::es256("late"));
    let provider = Provider::with(&[&ec, &rsa]).await;
    let gate = gate(provider.users()).await;
    // The first comes while the keys are being fetched, and waits.
    assert!(is_user(&gate, &ec.jwt()).await && is_user(&gate, &rsa.jwt()).await);
    assert_eq!(provider.asked(), 1);
    let wrong_key = Pair { kid: "ec", ..Pair::es256("x") };
    assert!(!is_user(&gate, &wrong_key.jwt()).await);
    assert!(!is_user(&gate, &sign(Algorithm::ES256, None, &claims(), &ec.key)).await, "no kid");
    assert!(!is_user(&gate, &sign(Algorithm::ES256, Some("rsa"), &claims(), &ec.key)).await, "a key of another kind");
    assert!(!is_user(&gate, &sign(Algorithm::PS256, Some("rsa"), &claims(), &rsa.key)).await, "another algorithm");
    assert!(!is_user(&gate, &late.jwt()).await);
    assert_eq!(provider.asked(), 1, "it was just asked");

    gap().await;
    let strangers: Vec<String> = (0..30).map(|_| late.jwt()).collect();
    let refused = futures::future::join_all(strangers.iter().map(|jwt| is_user(&gate, jwt))).await;
    assert!(refused.iter().all(|user| !user));
    assert_eq!(provider.asked(), 2, "once for all of them");
    // Rotation: the new key is there, the old one has left.
    gap().await;
    provider.answer.send_replace(Provider::set(&[&late, &rsa]));
    assert!(is_user(&gate, &ec.jwt()).await, "nobody has asked yet");
    let stream = gate.admit(&ec.jwt()).await.expect("still known");
    assert!(is_user(&gate, &late.jwt()).await && is_user(&gate, &rsa.jwt()).await);
    assert!(!is_user(&gate, &ec.jwt()).await, "it left the set");
    assert!(matches!(stream.renew().await, Err(Denied::Invalid)), "and streams that it opened end");
}

#[tokio::test]
async fn while_the_provider_is_down_slow_or_mad_the_last_good_keys_serve() {
    let (ec, unknown) = (Pair::es256("ec"), Pair::es256("unknown"));
    let provider = Provider::with(&[&ec]).await;
    let gate = gate(provider.users()).await;
    assert!(is_user(&gate, &ec.jwt()).await);
    let many: Vec<Value> = (0..65).map(|_| ec.jwk()).collect();
    for bad in [
        Answer::HangUp,
        Answer::Never,
        Answer::Text(500, json!({"keys": []}).to_string()),
        Answer::Text(302, String::new()),
        Answer::Text(200, "<html>".to_owned()),
        Answer::Text(200, "{}".to_owned()),
        Answer::Text(200, json!({"keys": 7}).to_string()),
        Answer::Text(200, json!({"keys": [], "more": "x".repeat(70_000)}).to_string()),
        Answer::Text(200, json!({"keys": many}).to_string()),
    ] {
        gap().await;
        provider.answer.send_replace(bad);
        let before = provider.asked();
        let began = Instant::now();
        let denied = gate.admit(&unknown.jwt()).await.err();
        assert!(matches!(denied, Some(Denied::Provider)), "nobody can tell: {denied:?}");
        assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
        assert_eq!(provider.asked(), before + 1);
        assert!(is_user(&gate, &ec.jwt()).await);
    }
    gap().await;
    provider.answer.send_replace(Provider::set(&[&ec, &unknown]));
    assert!(is_user(&gate, &unknown.jwt()).await, "well again");
    gap().await;
    provider.answer.send_replace(Answer::Text(200, json!({"keys": []}).to_string()));
    assert!(!is_user(&gate, &Pair::es256("other").jwt()).await);
    assert!(!is_user(&gate, &ec.jwt()).await, "a good answer without keys is one");
}

#[tokio::test]
async fn a_provider_that_never_answered_is_unavailable_until_it_does_and_is_asked_again_in_the_background() {
    let ec = Pair::es256("ec");
    let mut provider = Provider::start(Answer::HangUp).await;
    provider.config.retry_after = Duration::from_millis(200);
    let gate = gate(provider.users()).await;
    assert!(matches!(gate.admit(&ec.jwt()).await.err(), Some(Denied::Provider)));
    provider.answer.send_replace(Provider::set(&[&ec]));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let asked = provider.asked();
    assert!(is_user(&gate, &ec.jwt()).await);
    assert_eq!(provider.asked(), asked, "the keys were there");

    // A good answer grows old, too: a key that left is refused without anybody asking for another.
    provider.config.keep_for = Duration::from_millis(300);
    let fresh = self::gate(provider.users()).await;
    assert!(is_user(&fresh, &ec.jwt()).await);
    provider.answer.send_replace(Provider::set(&[]));
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(!is_user(&fresh, &ec.jwt()).await);
}

#[tokio::test]
async fn a_public_key_is_no_secret_and_unusable_keys_are_passed_over() {
    let (ec, rsa) = (Pair::es256("ec"), Pair::rs256("rsa"));
    let spki = |point: &[u8]| {
        let head = [
            0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1,
            7, 3, 0x42, 0,
        ];
        format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            STANDARD.encode([&head[..], point].concat())
        )
    };
    let random = aws_lc_rs::rand::SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).expect("a key");
    let point = pair.public_key().as_ref().to_vec();
    let named = Pair { kid: "named", algorithm: Algorithm::ES256, key: EncodingKey::from_ec_der(pkcs8.as_ref()) };
    let modulus = URL_SAFE_NO_PAD.decode(rsa.jwk()["n"].as_str().expect("n")).expect("base64url");
    let weak = json!({"kty": "RSA", "kid": "weak", "n": URL_SAFE_NO_PAD.encode(&modulus[..128]), "e": "AQAB"});
    let symmetric = json!({"kty": "oct", "kid": "oct", "k": URL_SAFE_NO_PAD.encode(SECRET), "alg": "HS256"});
    let mut encrypting = rsa.jwk();
    encrypting["kid"] = json!("enc");
    encrypting["use"] = json!("enc");
    let mut nameless = ec.jwk();
    nameless.as_object_mut().expect("an object").remove("kid");
    let others = [
        json!(7),
        json!({}),
        weak,
        symmetric,
        encrypting,
        nameless,
        json!({"kty": "EC", "kid": "p", "crv": "P-256", "x": "AA", "y": "AA"}),
    ];
    let keys: Vec<Value> = others.into_iter().chain([ec.jwk(), rsa.jwk(), named.jwk()]).collect();
    let provider = Provider::start(Answer::Text(200, json!({"keys": keys}).to_string())).await;
    for users in [provider.users(), UserTokens { secret: SECRET.parse().ok(), ..provider.users() }] {
        let gate = gate(users).await;
        for pair in [&ec, &rsa, &named] {
            assert!(is_user(&gate, &pair.jwt()).await, "{}", pair.kid);
        }
        let secrets = [
            point.clone(),
            point[1..].to_vec(),
            spki(&point).into_bytes(),
            named.jwk().to_string().into_bytes(),
            modulus.clone(),
        ];
        for secret in secrets {
            for kid in [None, Some("named"), Some("rsa")] {
                let jwt = sign(Algorithm::HS256, kid, &claims(), &EncodingKey::from_secret(&secret));
                assert!(!is_user(&gate, &jwt).await, "{kid:?}");
            }
        }
        let enc = sign(Algorithm::RS256, Some("enc"), &claims(), &rsa.key);
        assert!(!is_user(&gate, &enc).await, "a key for encryption");
    }
    let published = gate(provider.users()).await;
    let symmetric = sign(Algorithm::HS256, Some("oct"), &claims(), &EncodingKey::from_secret(SECRET.as_bytes()));
    assert!(!is_user(&published, &symmetric).await, "a published secret is none");
}
