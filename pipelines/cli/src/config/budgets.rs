//! The setting of what may be spent: by a tenant, as in `acme 20 USD/day`, or `* 100000 tokens/minute` for each of the others;
//! by a key or a job of a tenant's, as in `job nightly 5 USD/day` or `key * 1 USD/month`; by all together, as in `all 100 USD/day`.

use crate::console::wrong;
use forebay_calls::prices;
use forebay_operators::budgets::{Budget, Holder, Period, Unit};
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
                "budgets has {item:?} (from {from}); write a tenant, or * for each, and what it may spend, as in \
                 \"acme 20 USD/day\" or \"* 100000 tokens/minute\", or the same with \"key\" or \"job\" before it, as in \
                 \"job nightly 5 USD/day\", or \"all\" for all together; the times are minute, day and month"
            ))
        })
    };
    let budgets: Vec<Budget> = items.iter().map(read).collect::<anyhow::Result<_>>()?;
    for (index, budget) in budgets.iter().enumerate() {
        // Two limits on one counter: one of them would be held twice.
        if budgets[..index].iter().any(|other| other.is_like(budget) && other.of == budget.of) {
            return Err(wrong(format!(
                "budgets has {:?} (from {from}), and has said how much that is before it",
                items[index]
            )));
        }
    }
    Ok(budgets)
}

fn budget(item: &str) -> Option<Budget> {
    let mut words = item.rsplitn(3, ' ');
    let (of, amount, who) = (words.next()?, words.next()?, words.next()?.trim());
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
    let (holder, of) = match who.split_once(' ') {
        None if who == "all" => (Holder::All, "*"),
        Some(("tenant", tenant)) => (Holder::Tenant, tenant),
        Some(("key", key)) => (Holder::Key, key),
        Some(("job", job)) => (Holder::Job, job),
        _ => (Holder::Tenant, who),
    };
    let of = Some(of.trim().to_owned()).filter(|of| of != "*");
    (limit <= AMOUNT_MAX).then_some(Budget { holder, of, unit, period, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_reads_as_it_is_said() {
        let budgets = of("acme 0.5 USD/day, * 1000 tokens/minute", "f.yaml:3").unwrap();
        let acme = Budget {
            holder: Holder::Tenant,
            of: Some("acme".to_owned()),
            unit: Unit::Money,
            period: Period::Day,
            limit: 500_000_000,
        };
        let each =
            Budget { of: None, unit: Unit::Tokens, period: Period::Minute, limit: 1_000, ..acme.clone() };
        assert_eq!(budgets, [acme.clone(), each]);
        let said = "job nightly 0.5 USD/day, key * 1 tokens/month, tenant job 7 2 tokens/day";
        let [job, key, tenant] = <[Budget; 3]>::try_from(of(said, "f.yaml:3").unwrap()).unwrap();
        assert_eq!(job, Budget { holder: Holder::Job, of: Some("nightly".to_owned()), ..acme });
        assert_eq!((key.holder, key.of.as_deref()), (Holder::Key, None));
        assert_eq!((tenant.holder, tenant.of.as_deref()), (Holder::Tenant, Some("job 7")));
        assert_eq!(
            [job, key, tenant].map(|budget| budget.to_string()).join(", "),
            "0.5 USD/day, 1 tokens/month, 2 tokens/day"
        );
        let said = of("all 9 USD/day, tenant all 2 USD/day", "f.yaml:3").unwrap();
        let holders: Vec<_> = said.iter().map(|budget| (budget.holder, budget.of.as_deref())).collect();
        assert_eq!(holders, [(Holder::All, None), (Holder::Tenant, Some("all"))]);
        let twice = of("acme 1 USD/day, acme 2 USD/day", "f.yaml:3").unwrap_err().to_string();
        assert!(twice.starts_with("budgets has \"acme 2 USD/day\" (from f.yaml:3), and has said"), "{twice}");
        for refused in
            ["acme 1 EUR/day", "acme 1 USD/week", "1 USD/day", "acme -1 USD/day", "acme 1e9 USD/day"]
        {
            let fault = of(refused, "f.yaml:3").unwrap_err().to_string();
            assert!(fault.starts_with(&format!("budgets has {refused:?} (from f.yaml:3); ")), "{fault}");
        }
    }
}
