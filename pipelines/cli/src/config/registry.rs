//! The settings of rows in Avro: what stands before each on its topic, and the schema registry that says what it means.

use crate::{
    config::{Sourced, from, one_of, text},
    console::wrong,
};
use forebay_runtime::host::kafka::RegistrySettings;
use reqwest::Url;
use std::collections::BTreeMap;

const URL: &str = "avro.schema_registry";
const USER: &str = "avro.schema_registry_user";
const USER_FILE: &str = "avro.schema_registry_user_file";

/// The registry, where one is named.
pub fn of(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Option<RegistrySettings>> {
    let is_written = one_of(values, "avro.framing", "single_object or confluent", |text| match text {
        "single_object" => Some(false),
        "confluent" => Some(true),
        _ => None,
    })?;
    let (url, user, file) = (text(values, URL), text(values, USER), text(values, USER_FILE));
    if url.is_empty() {
        let has_user = !user.is_empty() || !file.is_empty();
        return match (is_written, has_user) {
            (true, _) => Err(wrong(format!(
                "avro.framing is \"confluent\" (from {}), which needs a schema registry: name it by {URL} (or \
                 FOREBAY_AVRO_SCHEMA_REGISTRY)",
                from(values, "avro.framing")
            ))),
            (false, true) => Err(wrong(format!(
                "a user of a schema registry has no effect without its address: add {URL}"
            ))),
            (false, false) => Ok(None),
        };
    }
    let is_plain = |url: &Url| {
        let has_user = !url.username().is_empty() || url.password().is_some();
        matches!(url.scheme(), "http" | "https") && !has_user && url.query().is_none()
    };
    if !url.parse().is_ok_and(|url| is_plain(&url)) {
        return Err(wrong(format!(
            "{URL} (from {}) is no URL such as http://registry:8081; its user stands in {USER_FILE} or in \
             FOREBAY_AVRO_SCHEMA_REGISTRY_USER",
            from(values, URL)
        )));
    }
    let user = match (user, file) {
        ("", "") => None,
        ("", file) => Some(std::fs::read_to_string(file).map_err(|fault| {
            wrong(format!("could not read {USER_FILE} {file} (from {}): {fault}", from(values, USER_FILE)))
        })?),
        (user, _) => Some(user.to_owned()),
    };
    let user = user.map(|user| user.trim().to_owned());
    if user.as_ref().is_some_and(|user| !user.contains(':')) {
        return Err(wrong("the user of the schema registry is written as name:password"));
    }
    Ok(Some(RegistrySettings { url: url.to_owned(), user, is_written }))
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, merge};

    fn read(avro: &str, user: Option<&str>) -> Result<Config, String> {
        let file = format!("avro: {avro}\n");
        let variable =
            |name: &str| user.filter(|_| name == "FOREBAY_AVRO_SCHEMA_REGISTRY_USER").map(str::to_owned);
        merge(Some(("f.yaml", &file)), variable, &[]).map_err(|fault| fault.to_string())
    }

    #[test]
    fn a_registry_is_read_from_and_written_to_where_that_is_asked_for() {
        assert!(read("{framing: single_object}", None).unwrap().registry.is_none());
        let only_read = read("{schema_registry: 'http://r:8081'}", None).unwrap().registry.unwrap();
        assert_eq!((only_read.is_written, only_read.user), (false, None));
        let avro = "{framing: confluent, schema_registry: 'https://r/apis/ccompat/v7'}";
        let config = read(avro, Some("ana:canary")).unwrap();
        let shown = format!("{:?}", config.shown());
        assert!(!shown.contains("canary"), "{shown}");
        let registry = config.registry.unwrap();
        assert_eq!((registry.is_written, registry.user.as_deref()), (true, Some("ana:canary")));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("user");
        std::fs::write(&file, "bob:secret\n").unwrap();
        let avro =
            format!("{{schema_registry: 'http://r', schema_registry_user_file: '{}'}}", file.display());
        assert_eq!(read(&avro, None).unwrap().registry.unwrap().user.as_deref(), Some("bob:secret"));
    }

    #[test]
    fn what_is_wrong_is_named_and_no_user_is() {
        let refused = |avro: &str, user| read(avro, user).err().unwrap();
        let framing = refused("{framing: confluence}", None);
        assert!(framing.contains("avro.framing is \"confluence\" (from f.yaml:1)"), "{framing}");
        assert!(framing.ends_with("it may be single_object or confluent"), "{framing}");
        let alone = refused("{framing: confluent}", None);
        assert!(alone.contains("needs a schema registry: name it by avro.schema_registry"), "{alone}");
        let user = refused("{schema_registry: 'http://ana:canary@r:8081'}", None);
        assert!(user.contains("FOREBAY_AVRO_SCHEMA_REGISTRY_USER") && !user.contains("canary"), "{user}");
        assert!(refused("{schema_registry: 'r:8081'}", None).contains("http://registry:8081"));
        let lonely = refused("{framing: single_object}", Some("ana:canary"));
        assert!(lonely.contains("add avro.schema_registry") && !lonely.contains("canary"), "{lonely}");
        let bare = refused("{schema_registry: 'http://r'}", Some("canary"));
        assert!(bare.contains("name:password") && !bare.contains("canary"), "{bare}");
        let inline = refused("{schema_registry: 'http://r', schema_registry_user: 'ana:canary'}", None);
        assert!(inline.contains("avro.schema_registry_user_file"), "{inline}");
        let missing = refused("{schema_registry: 'http://r', schema_registry_user_file: /nowhere/u}", None);
        assert!(missing.contains("/nowhere/u"), "{missing}");
    }
}
