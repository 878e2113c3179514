//! The setting of what tenants may spend: `acme 20 USD/day`, or `* 100000 tokens/minute` for each of the others.

use crate::console::wrong;
use forebay_calls::prices;
use forebay_operators::budgets::{Budget, Period, Unit};
use forebay_stores::counters::{AMOUNT_MAX, LINES_MAX};

/// The budgets in a list of them, joined by commas.
pub fn of(text: &str, from: &str) -> anyhow::Result<Vec<Budget>> {
    let items: Vec<_> = text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    if items.len() > LINES_MAX {
        return Err(wrong(format!(
            "budgets has {} lines (from {from}); it may have {LINES_MAX}",
            items.len()
        )));
    }
    let read = |item: &&str| {
        budget(item).ok_or_else(|| {
            wrong(format!(
                "budgets has {item:?} (from {from}); write a tenant, or * for each, and what it may spend, \
                 as in \"acme 20 USD/day\" or \"* 100000 tokens/minute\"; the times are minute, day and month"
            ))
        })
    };
    items.iter().map(read).collect()
}

fn budget(item: &str) -> Option<Budget> {
    let mut words = item.rsplitn(3, ' ');
    let (of, amount, tenant) = (words.next()?, words.next()?, words.next()?.trim());
    let (unit, period) = of.split_once('/')?;
    let period = match period {
        "minute" => Period::Minute,
        "day" => Period::Day,
        "month" => Period::Month,
        _ => return None,
    };
    let (unit, limit) = match unit {
        "USD" => (Unit::Money, u64::try_from(prices::dollars(amount)?.0).ok()?),
        "tokens" => (Unit::Tokens, amount.parse().ok()?),
        _ => return None,
    };
    let tenant = Some(tenant.to_owned()).filter(|tenant| tenant != "*");
    (limit <= AMOUNT_MAX).then_some(Budget { tenant, unit, period, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_reads_as_it_is_said() {
        let budgets = of("acme 0.5 USD/day, * 1000 tokens/minute", "f.yaml:3").unwrap();
        let acme = Budget {
            tenant: Some("acme".to_owned()),
            unit: Unit::Money,
            period: Period::Day,
            limit: 500_000_000,
        };
        assert_eq!(
            budgets,
            [acme, Budget { tenant: None, unit: Unit::Tokens, period: Period::Minute, limit: 1_000 }]
        );
        for refused in
            ["acme 1 EUR/day", "acme 1 USD/week", "1 USD/day", "acme -1 USD/day", "acme 1e9 USD/day"]
        {
            let fault = of(refused, "f.yaml:3").unwrap_err().to_string();
            assert!(fault.starts_with(&format!("budgets has {refused:?} (from f.yaml:3); ")), "{fault}");
        }
    }
}
