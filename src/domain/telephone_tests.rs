//! Numbers as they are found in the wild. All of them are reserved for fiction, service numbers, or not in service.

use proptest::prelude::*;

use super::*;

fn read<'a>(text: &str, region: impl Into<Option<&'a str>>) -> Option<String> {
    E164::read(text, region.into()).map(String::from)
}

#[test]
fn one_number_has_one_text_however_it_is_written() {
    for text in [
        "+902120000000",
        "+90 212 000 00 00",
        "+90 (0) 212 000 00 00",
        "+90-(212)-000.00/00",
        "0212 000 00 00",
        "212 000 00 00",
        "90 212 000 00 00",
        "00 90 212 000 00 00",
        "tel:+902120000000",
        "TEL:%2B90%20212%20000%2000%2000",
        "tel://+90-212-000-00-00",
        "tel:+902120000000;ext=12",
        "tel:+902120000000,,5",
        "tel:0212-000-00-00;phone-context=+90",
        "tel:000-00-00;isub=1;phone-context=+90-212",
        "whatsapp:+902120000000",
        "callto:+902120000000",
        "\u{FF0B}\u{FF19}\u{FF10}\u{FF12}\u{FF11}\u{FF12}0000000",
        "\u{202A}+90\u{A0}212\u{2011}000\u{200B}0000\u{202C}",
        "+\u{0669}\u{0660}\u{0662}\u{0661}\u{0662}0000000",
        "\u{06F0}\u{06F2}\u{06F1}\u{06F2}0000000",
    ] {
        assert_eq!(read(text, "TR").as_deref(), Some("+902120000000"), "{text}");
    }
}

#[test]
fn a_national_number_is_read_in_its_region() {
    for (text, region, expected) in [
        ("(202) 555-0123", Some("US"), Some("+12025550123")),
        ("1-202-555-0123", Some("us"), Some("+12025550123")),
        ("011 44 20 7946 0123", Some("US"), Some("+442079460123")),
        ("020 7946 0123", Some("GB"), Some("+442079460123")),
        ("02 3661 8300", Some("IT"), Some("+390236618300")),
        ("+39 02 3661 8300", Some("GB"), Some("+390236618300")),
        ("444 0 000", Some("TR"), Some("+904440000")),
        ("155", Some("TR"), None),
        ("8 812 000-00-00", Some("RU"), Some("+78120000000")),
        ("+7 812 000-00-00", None, Some("+78120000000")),
        ("8 10 44 20 7946 0123", Some("RU"), Some("+442079460123")),
        ("+1 415 555 0123", Some("AU"), Some("+14155550123")),
        ("0212 000 00 00", None, None),
        ("0212 000 00 00", Some("ZZ"), None),
        ("0212 000 00 00", Some(""), None),
        ("0212 000 00 00", Some("Türkiye"), None),
    ] {
        assert_eq!(read(text, region).as_deref(), expected, "{text} in {region:?}");
    }
}

#[test]
fn what_has_troubled_parsers_is_read_or_refused() {
    for (text, expected) in [
        ("+1 650-253-0000", Some("+16502530000")),
        ("+1-650 253.0000", Some("+16502530000")),
        ("+687 11.11.11", Some("+687111111")),
        ("+442079460123", Some("+442079460123")),
        ("+800 1234 5678", Some("+80012345678")),
        ("  2 22#:", None),
        ("0xdeadbeef", None),
        ("deadbeef1234", None),
        ("0800-4-PIZZA", None),
        ("1-800-FLOWERS", None),
        ("+9999999999999999", None),
        ("+99999999999999999999999999", None),
        ("72057594037927936", None),
        ("+0000000000", None),
        ("0000000000", None),
        ("+", None),
        ("++902120000000", None),
        ("90+2120000000", None),
        ("+90", None),
        ("+9012", None),
        ("+999 123 456", None),
        ("*31#02120000000", None),
        ("2024-05-06T10:00:00", None),
        ("a@b.example", None),
        ("tel:", None),
        ("tel:%FF%FE", None),
        ("tel:%2", None),
        (";phone-context=+90", None),
        ("", None),
        ("\0", None),
    ] {
        assert_eq!(read(text, "TR").as_deref(), expected, "{text:?}");
    }
    assert_eq!(read(&" 0212 000 00 00".repeat(100), "TR"), None);
}

#[test]
fn an_anonymous_caller_has_no_number() {
    let words = ["", " ", "anonymous", "Private", "RESTRICTED", "unknown", "blocked", "withheld", "N/A", "null", "-1"];
    for text in words.into_iter().chain(SPELLED.iter().map(|(_, digits)| *digits)) {
        assert_eq!(caller(text, Some("TR")), None, "{text:?}");
    }
    assert_eq!(caller("0555 000 00 00", Some("TR")).map(String::from).as_deref(), Some("+905550000000"));
}

#[test]
fn the_spelled_words_are_spelled_as_the_keys_have_them() {
    for (word, digits) in SPELLED {
        let key =
            |letter| ["abc", "def", "ghi", "jkl", "mno", "pqrs", "tuv", "wxyz"].iter().position(|k| k.contains(letter));
        let keys: String = word.chars().filter_map(key).map(|key| (key + 2).to_string()).collect();
        assert_eq!(digits, format!("+{keys}"), "{word}");
    }
}

#[test]
fn a_click_names_its_number() {
    for (label, expected) in [
        ("tel:0212 000 00 00", Some("+902120000000")),
        ("+90 212 000 00 00", Some("+902120000000")),
        ("https://wa.me/902120000000", Some("+902120000000")),
        ("https://wa.me/+902120000000?text=Hello%20there", Some("+902120000000")),
        ("https://wa.me/%2B902120000000/", Some("+902120000000")),
        ("http://WWW.wa.me/00902120000000", Some("+902120000000")),
        ("wa.me/902120000000", Some("+902120000000")),
        ("https://api.whatsapp.com/send?phone=902120000000&text=1", Some("+902120000000")),
        ("https://api.whatsapp.com/send/?text=1&phone=+90 212 000 00 00", Some("+902120000000")),
        ("https://web.whatsapp.com/send?phone=%2B90%20212%20000%2000%2000", Some("+902120000000")),
        ("whatsapp://send?phone=902120000000", Some("+902120000000")),
        ("whatsapp://send/?Phone=%2B902120000000", Some("+902120000000")),
        ("https://wa.me/12025550123", Some("+12025550123")),
        ("https://wa.me/message/ABCDEFGH1234", None),
        ("https://wa.me/message/12025550123", None),
        ("https://wa.me/", None),
        ("https://wa.me/02120000000", None),
        ("whatsapp://send?text=hi", None),
        ("https://api.whatsapp.com/send?text=12025550123", None),
        ("https://wa.me.example/902120000000", None),
        ("https://example.com/902120000000", None),
        ("Call us now", None),
        ("mailto:a@b.example", None),
        ("", None),
    ] {
        assert_eq!(clicked(label, Some("TR")).map(String::from).as_deref(), expected, "{label}");
    }
    assert!(is_whatsapp_link(" https://wa.me/message/ABCDEFGH1234") && is_whatsapp_link("whatsapp://send?text=hi"));
    assert!(!is_whatsapp_link("tel:+902120000000") && !is_whatsapp_link("WhatsApp") && !is_whatsapp_link(""));
}

#[test]
fn stored_text_is_read_strictly() {
    for text in ["+1", "902120000000", "+0212", "+90212 0000000", "+9021200000000000", "", "+"] {
        assert_eq!(text.parse::<E164>(), Err(NotE164), "{text}");
    }
    let number: E164 = serde_json::from_str("\"+902120000042\"").expect("it is E.164");
    assert_eq!((number.last_digits(), serde_json::json!(number)), ("42", "+902120000042".into()));
    assert!(serde_json::from_str::<E164>("\"0212\"").is_err());
}

const REGIONS: [&str; 14] = ["TR", "US", "GB", "DE", "IT", "RU", "AU", "BR", "AR", "MX", "JP", "BY", "AT", "KZ"];

#[test]
fn what_every_country_calls_an_example_survives() {
    let mut seen = 0;
    for plan in DATABASE.iter() {
        let kinds = [plan.descriptors().fixed_line(), plan.descriptors().mobile(), plan.descriptors().toll_free()];
        for example in kinds.into_iter().flatten().filter_map(|kind| kind.example()) {
            let expected = format!("+{}{example}", plan.country_code());
            assert_eq!(read(&expected, None).as_ref(), Some(&expected), "{}", plan.id());
            if plan.id() != "001" {
                assert_eq!(read(example, plan.id()).as_ref(), Some(&expected), "{example} in {}", plan.id());
                let trunk = plan.national_prefix().map(|trunk| format!("{trunk}{example}"));
                // Belarus has numbers that are numbers with and without the 8 before them.
                if let Some(dialled) = trunk.filter(|dialled| !fits(plan, dialled)) {
                    assert_eq!(read(&dialled, plan.id()).as_ref(), Some(&expected), "{dialled} in {}", plan.id());
                }
                let abroad = format!("00{}{example}", plan.country_code());
                assert_eq!(read(&abroad, "TR").as_ref(), Some(&expected), "{abroad} from TR");
            }
            seen += 1;
        }
    }
    assert!(seen > 400, "{seen}");
}

proptest! {
    #[test]
    fn no_text_panics_and_what_was_read_is_e164(text in any::<String>(), region in "[A-Za-z]{0,3}") {
        for number in [E164::read(&text, Some(&region)), caller(&text, None), clicked(&text, Some(&region))] {
            prop_assert!(number.is_none_or(|number| number.as_str().parse::<E164>() == Ok(number.clone())));
        }
    }

    #[test]
    fn what_was_read_reads_as_itself_in_any_region(
        text in prop_oneof!["\\+[1-9][0-9]{3,16}", "0{0,2}[0-9]{4,14}", "(tel:)?\\+?[0-9 ().-]{3,20}(;ext=[0-9])?"],
        region in proptest::sample::select(REGIONS.to_vec()),
        other in proptest::option::of(proptest::sample::select(REGIONS.to_vec())),
    ) {
        if let Some(number) = E164::read(&text, Some(region)) {
            prop_assert!(DIGITS.contains(&(number.as_str().len() - 1)));
            prop_assert_eq!(E164::read(number.as_str(), other), Some(number.clone()));
            prop_assert_eq!(clicked(&format!("https://wa.me/{}", &number.as_str()[1..]), other), Some(number));
        }
    }
}
